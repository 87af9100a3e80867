"""Training in any layout that is saved on the way, or begins from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch

MODELS = {"paper": PAPER, "by_level": BY_LEVEL}
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    precision: str = "fp32"
    model: str = "paper"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def tree(self) -> dict[str, Any]:
        return layout(
            MODELS[self.model], self.tensor, self.pipeline, self.zero, self.precision, micro=2
        )

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}pp{self.pipeline}dp{self.data}"
        return f"{sizes}-zero{self.zero}-{self.precision}-{self.model}"


def parse(text: str) -> Layout:
    """As in "2 1 2 zero1 bf16": tensor, pipeline, data, ..."""
    sizes, words = text.split()[:3], text.split()[3:]
    zero = next((int(w[4]) for w in words if w.startswith("zero")), 1)
    precision = "bf16" if "bf16" in words else "fp32"
    return Layout(*map(int, sizes), zero, precision, "by_level" if "by_level" in words else "paper")


class Run:
    """A training run in this world, step by step."""

    def __init__(self, tree: dict[str, Any]) -> None:

        from hg_scale.parallel.mesh import make_mesh
        from hg_scale.training.engine import make_engine

        self.config = parse_config(tree, world_size=dist.get_world_size())
        self.mesh, parts = make_mesh(self.config.parallel)
        self.engine = make_engine(self.config, self.mesh, parts, torch.device("cpu"))

    def train(self, first: int, count: int) -> Curve:
        """(loss, gradient norm) of each step."""
        reads = self.mesh.is_first_stage or self.mesh.is_last_stage
        rows = self.engine.local_samples
        results = []
        for step in range(first, first + count):
            batch = random_batch(self.config, step)[rows] if reads else None
            result = self.engine.train_step(batch, step, 1e-3 / step)
            results.append((result.loss, result.grad_norm))
        return results

    def save(self, folder: Path, step: int) -> Path:
        from hg_scale.training.state import TrainingProgress, save_state

        return save_state(self.engine, folder, TrainingProgress(step, 17, 0), self.config)
