"""Saving and resuming a run: the engine's fragments, and where training stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.checkpoint.deepspeed_state import (
    LocalState,
    load_states,
    local_states,
    optimizer_step,
)
from hg_scale.checkpoint.find import read_manifest
from hg_scale.checkpoint.load import Reader
from hg_scale.checkpoint.save import save
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config
from hg_scale.training.loop import Progress

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine

# Keys of the model that may change between runs: they move no weight.
_FREE = {"sequence_length", "dropout", "shorten_factor_choices", "initialization"}


def save_state(engine: Engine, folder: Path, progress: Progress, config: Config) -> Path:
    """Write a checkpoint of all ranks; the data position is part of `progress`."""
    mesh = engine.mesh
    meta = {
        "progress": asdict(progress),
        "optimizer_step": optimizer_step(engine.deepspeed),
        "layout": {
            "tensor": mesh.tensor,
            "pipeline": mesh.pipeline,
            "data": mesh.data,
            "zero_stage": config.parallel.zero_stage,
        },
        "config": config.model_dump(),
        "versions": {name: version(name) for name in ("hg-scale", "torch", "deepspeed", "numpy")},
    }
    return save(folder, progress.step, written_here(engine), meta)


def written_here(engine: Engine) -> Iterator[LocalState]:
    """The fragments that this rank writes: what several ranks hold alike is written by one."""
    mesh, copies = engine.mesh, engine.config.parallel.zero_stage == 0
    for number, local in enumerate(local_states(engine.deepspeed, engine.slices)):
        whole = local.fragment.slice.dim is None
        if whole and number % mesh.tensor != mesh.tensor_rank:
            continue  # alike on all tensor ranks: they take turns
        if copies and number % mesh.data != mesh.data_rank:
            continue  # without ZeRO, alike on all data-parallel ranks
        if getattr(local.parameter, "ds_pipe_replicated", False):
            continue  # the first stage writes it
        yield local


def load_state(engine: Engine, checkpoint: Path) -> Progress:
    """Set weights, optimizer and counters from a checkpoint written in any layout."""
    reader = Reader(checkpoint)
    load_states(engine.deepspeed, engine.slices, reader.read, reader.manifest["optimizer_step"])
    return Progress(**reader.manifest["progress"])


def refuse_other_model(config: Config, checkpoint: Path) -> None:
    """Raise ConfigError listing the keys in which a checkpoint's model differs."""
    manifest = read_manifest(checkpoint)
    ours = config.model.model_dump()
    theirs: dict[str, Any] = manifest["config"]["model"]
    problems = [
        Problem(
            f"model.{key}",
            f"the checkpoint {checkpoint} has {theirs.get(key)!r}; set it so, or use another --run",
            value,
        )
        for key, value in ours.items()
        if key not in _FREE and value != theirs.get(key)
    ]
    if problems:
        raise ConfigError(problems)
