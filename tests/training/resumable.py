"""Training in any layout that saves checkpoints or resumes from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.models import BY_LEVEL, PAPER, build_engine, layout, local_batch

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
    """Parse "2 1 2 zero1 bf16": tensor, pipeline and data parallel sizes, then options."""
    sizes, options = text.split()[:3], text.split()[3:]
    zero = next((int(w[4]) for w in options if w.startswith("zero")), 1)
    precision = "bf16" if "bf16" in options else "fp32"
    model = "by_level" if "by_level" in options else "paper"
    return Layout(*map(int, sizes), zero, precision, model)


class Run:
    """A training run in this world, step by step."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.engine = build_engine(tree)
        self.config, self.mesh = self.engine.config, self.engine.mesh

    def train(self, first: int, count: int) -> Curve:
        """Take `count` steps from step `first`; (loss, gradient norm) of each."""
        results = []
        for step in range(first, first + count):
            batch = local_batch(self.engine, step)
            result = self.engine.train_step(batch, step, 1e-3 / step)
            results.append((result.loss, result.grad_norm))
        return results

    def save(self, folder: Path, step: int) -> Path:
        from hg_scale.training.state import TrainingProgress, save_state

        return save_state(self.engine, folder, TrainingProgress(step, 17, 0), self.config)
