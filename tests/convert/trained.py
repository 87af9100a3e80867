"""Small trained checkpoints, one per layout, shared by the tests of conversions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

STEPS, AFTER = 2, 2  # before and after the save
RATE = 1e-3

# tensor, pipeline, data, ZeRO stage, model
LAYOUTS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "plain": (1, 1, 1, 0, PAPER),
    "tp2pp2": (2, 2, 1, 1, PAPER),
    "zero3": (1, 1, 2, 3, BY_LEVEL),
}


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint after `STEPS`, its configuration, and the losses of the steps after it."""

    path: Path
    tree: dict[str, Any]
    losses: list[float]


def make(worlds: Worlds, kind: str, folder: Path) -> TrainedCheckpoint:
    tensor, pipeline, data, zero, model = LAYOUTS[kind]
    tree = layout(model, tensor, pipeline, zero)
    path, losses = worlds.run(tensor * pipeline * data, train_and_save, tree, folder)[0]
    return TrainedCheckpoint(path, tree, losses)


def train_and_save(tree: dict[str, Any], folder: Path) -> tuple[Path, list[float]]:
    """Train, save, and continue training."""
    from hg_scale.training.state import TrainingProgress, save_state

    engine, config = engine_of(tree)
    train(engine, config, 1, STEPS)
    path = save_state(engine, folder, TrainingProgress(STEPS, 17, 0), config)
    return path, train(engine, config, STEPS + 1, AFTER)


def engine_of(tree: dict[str, Any]) -> tuple[Any, Any]:
    """Make an engine of this world's processes."""
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    return make_engine(config, mesh, parts, torch.device("cpu")), config


def train(engine: Any, config: Any, first: int, count: int) -> list[float]:
    """Train `count` steps from step `first` on; return their losses."""
    mesh = engine.mesh
    sequences = engine.local_samples
    reads = mesh.is_first_stage or mesh.is_last_stage
    losses = []
    for step in range(first, first + count):
        batch = random_batch(config, step)[sequences] if reads else None
        losses.append(engine.train_step(batch, step, RATE).loss)
    return losses
