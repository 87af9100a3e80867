"""The configuration files of a Slurm job, as they were at its first start.

A job may be requeued days later. It runs on from a copy of the files that it was started with,
whatever has been edited since, just as from its copy of the code. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hg_scale.atomic_write import write_durable
from hg_scale.config.errors import ConfigError, format_value
from hg_scale.config.read import apply_override, read_tree
from hg_scale.errors import UserError


def job_copy(run: Path) -> Path | None:
    """Return where a start inside a Slurm job keeps its configuration; None outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    return run / "code" / job / "config.json" if job else None


def is_requeued() -> bool:
    """Whether this is a later start of a Slurm job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def keep_config(config: Path, copy: Path) -> None:
    """Write a configuration file, merged with those that it extends, to `copy`.

    Raises ConfigError, or UserError if the copy cannot be written.
    """
    tree = read_tree(config)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_durable(copy, json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{copy}: cannot be written: {error}; choose another --run") from None


def describe_changes(copy: Path, config: Path, overrides: Sequence[str]) -> str | None:
    """Describe in one line what `config` and its bases now say and the job does not use.

    None if nothing differs once the overrides are applied.
    """
    try:
        before, now = (_flatten(_read(path, overrides)) for path in (copy, config))
    except ConfigError as error:
        return (
            f"{config} cannot be read any more ({error.problems[0].message}); the job continues "
            "with the configuration of its first start"
        )
    changed = [
        f"{key} {_value(before, key)} -> {_value(now, key)}"
        for key in dict.fromkeys((*before, *now))
        if _value(before, key) != _value(now, key)
    ]
    if not changed:
        return None
    return (
        f"{config} has changed since the first start of this job, which continues without: "
        f"{', '.join(changed)}; to use it, submit a new job, or with --reread-config"
    )


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = read_tree(path)
    for text in overrides:
        apply_override(tree, text)
    return tree


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(flat: Mapping[str, Any], key: str) -> str:
    return format_value(flat[key]) if key in flat else "unset"
