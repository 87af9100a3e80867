"""Whether a checkpoint is of the configured model, and what else has changed. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hg_scale.checkpoint.find import read_manifest
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import FREE_MODEL_KEYS, Config, ModelConfig

# What a curve depends on, whatever the layout, beside the model and the seed.
_CURVE = {
    "optimizer": None,
    "schedule": None,
    "training": {"steps", "global_batch_size", "precision"},
    "model": FREE_MODEL_KEYS,
}


def changed_keys(config: Config, before: dict[str, Any]) -> list[str]:
    """What of the training is not as in a checkpoint's configuration: `key was -> is`."""
    now = config.model_dump()
    return [
        f"{section}.{key} {before[section][key]} -> {now[section][key]}"
        for section, keys in _CURVE.items()
        for key in now[section]
        if (keys is None or key in keys)
        and key in before.get(section, {})
        and before[section][key] != now[section][key]
    ]


def refuse_other_model(config: Config, checkpoint: Path) -> None:
    """Raise ConfigError listing the keys in which a checkpoint's model differs."""
    manifest = read_manifest(checkpoint)
    ours = config.model.model_dump()
    # A key that is younger than the checkpoint had its default's meaning.
    theirs: dict[str, Any] = ModelConfig().model_dump() | manifest["config"]["model"]  # type: ignore[call-arg]
    problems = [
        Problem(
            f"model.{key}",
            f"the checkpoint {checkpoint} has {theirs.get(key)!r}; set it so, or use another --run",
            value,
        )
        for key, value in ours.items()
        if key not in FREE_MODEL_KEYS and value != theirs.get(key)
    ]
    if problems:
        raise ConfigError(problems)
