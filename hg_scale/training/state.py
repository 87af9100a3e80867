"""The state of a run: what a checkpoint holds of the engine and of the progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.local_state import (
    load_states,
    local_states,
    optimizer_step,
    required_fragments,
)
from hg_scale.checkpoint.rank_file import LocalState, equal_share
from hg_scale.checkpoint.save import save_checkpoint
from hg_scale.config.schema import Config
from hg_scale.model.hourglass import parameter_shapes
from hg_scale.parallel.deepspeed_adapter import is_stage_copy

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine


@dataclass
class TrainingProgress:
    """The current step and data position: saved with weights and optimizer."""

    step: int = 0
    position: int = 0  # in the data, in tokens of all ranks
    skipped: int = 0  # bad steps, skipped by the optimizer
    data: dict[str, Any] = field(default_factory=dict)  # `BatchLoader.state()`


def save_state(engine: Engine, folder: Path, progress: TrainingProgress, config: Config) -> Path:
    """Write a checkpoint from all ranks. A collective."""
    metadata = state_metadata(engine, progress, config)
    names = parameter_shapes(config.model).keys()
    return save_checkpoint(folder, progress.step, states_to_write(engine), metadata, names)


def state_metadata(engine: Engine, progress: TrainingProgress, config: Config) -> dict[str, Any]:
    """Return the metadata of a checkpoint's manifest, as a copy that later steps do not change.

    No random state: everything random is a function of `training.seed` and the step.
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
    """Return the layout of an engine as it is written in a manifest."""
    mesh, zero_stage = engine.mesh, engine.config.parallel.zero_stage
    sizes = {"tensor": mesh.tensor, "pipeline": mesh.pipeline, "data": mesh.data}
    return {**sizes, "zero_stage": zero_stage}


def describe_layout(layout: dict[str, int]) -> str:
    """Format a layout, as in "TP2 x PP1 x DP4, ZeRO 1"."""
    return (
        f"TP{layout['tensor']} x PP{layout['pipeline']} x DP{layout['data']}, "
        f"ZeRO {layout['zero_stage']}"
    )


def states_to_write(engine: Engine) -> Iterator[LocalState]:
    """The fragments that this rank writes: ranks that hold identical state write equal shares."""
    mesh, replicated = engine.mesh, engine.config.parallel.zero_stage == 0
    sharded: list[LocalState] = []
    unsharded: list[LocalState] = []  # identical on all tensor ranks
    for local in local_states(engine.deepspeed, engine.slices):
        if is_stage_copy(local.parameter):
            continue  # the first stage writes it
        (unsharded if local.fragment.slice.dim is None else sharded).append(local)
    # Without ZeRO, all data-parallel ranks hold the same state.
    index, count = (mesh.data_rank, mesh.data) if replicated else (0, 1)
    yield from equal_share(sharded, index, count)
    yield from equal_share(unsharded, index * mesh.tensor + mesh.tensor_rank, count * mesh.tensor)


def load_state(engine: Engine, checkpoint: Path) -> TrainingProgress:
    """Set weights, optimizer and counters from a checkpoint written in any layout."""
    reader = CheckpointReader(checkpoint)
    reader.prefetch(required_fragments(engine.deepspeed, engine.slices))
    load_states(engine.deepspeed, engine.slices, reader.read, reader.manifest["optimizer_step"])
    engine.guard.load(reader.manifest.get("guard", {}))
    return TrainingProgress(**reader.manifest["progress"])
