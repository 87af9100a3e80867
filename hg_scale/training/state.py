"""Saving and resuming a run: the engine's fragments, and where training stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.checkpoint.deepspeed_state import (
    LocalState,
    load_states,
    local_states,
    needed,
    optimizer_step,
)
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.rank_file import equal_share
from hg_scale.checkpoint.save import save_checkpoint
from hg_scale.config.schema import Config
from hg_scale.convert.source import parameter_shapes

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine


@dataclass
class TrainingProgress:
    """Where training stands: what a checkpoint carries beside weights and optimizer."""

    step: int = 0
    position: int = 0  # in the data, in tokens over all ranks
    skipped: int = 0  # bad steps, whose update was not made
    data: dict[str, Any] = field(default_factory=dict)  # of the schedule: `Batches.state`


def save_state(engine: Engine, folder: Path, progress: TrainingProgress, config: Config) -> Path:
    """Write a checkpoint of all ranks; the data position is part of `progress`."""
    meta = describe_state(engine, progress, config)
    names = parameter_shapes(config.model).keys()
    return save_checkpoint(folder, progress.step, written_here(engine), meta, names)


def describe_state(engine: Engine, progress: TrainingProgress, config: Config) -> dict[str, Any]:
    """What the manifest says beside the files; later steps do not change it.

    There is no random state among it: whatever is random is a function of `training.seed` and the
    step.
    """
    return {
        "progress": asdict(progress),
        "guard": engine.guard.state(),
        "optimizer_step": optimizer_step(engine.deepspeed),
        "layout": layout_of(engine),
        "config": config.model_dump(),
        "tokenizer": progress.data.get("tokenizer"),
        "versions": {name: version(name) for name in ("hg-scale", "torch", "deepspeed", "numpy")},
    }


def layout_of(engine: Engine) -> dict[str, int]:
    """The layout as a manifest has it."""
    mesh, zero_stage = engine.mesh, engine.config.parallel.zero_stage
    sizes = {"tensor": mesh.tensor, "pipeline": mesh.pipeline, "data": mesh.data}
    return {**sizes, "zero_stage": zero_stage}


def describe_layout(layout: dict[str, int]) -> str:
    """A layout in a few characters."""
    return (
        f"TP{layout['tensor']} x PP{layout['pipeline']} x DP{layout['data']}, "
        f"ZeRO {layout['zero_stage']}"
    )


def written_here(engine: Engine) -> Iterator[LocalState]:
    """The fragments that this rank writes: of what several ranks hold alike, an equal share."""
    mesh, copies = engine.mesh, engine.config.parallel.zero_stage == 0
    cut: list[LocalState] = []
    whole: list[LocalState] = []  # alike on all tensor ranks
    for local in local_states(engine.deepspeed, engine.slices):
        if getattr(local.parameter, "ds_pipe_replicated", False):
            continue  # the first stage writes it
        (whole if local.fragment.slice.dim is None else cut).append(local)
    # Without ZeRO, all is alike on the data-parallel ranks.
    index, count = (mesh.data_rank, mesh.data) if copies else (0, 1)
    yield from equal_share(cut, index, count)
    yield from equal_share(whole, index * mesh.tensor + mesh.tensor_rank, count * mesh.tensor)


def load_state(engine: Engine, checkpoint: Path) -> TrainingProgress:
    """Set weights, optimizer and counters from a checkpoint written in any layout."""
    reader = CheckpointReader(checkpoint)
    reader.prefetch(needed(engine.deepspeed, engine.slices))
    load_states(engine.deepspeed, engine.slices, reader.read, reader.manifest["optimizer_step"])
    engine.guard.load(reader.manifest.get("guard", {}))
    return TrainingProgress(**reader.manifest["progress"])
