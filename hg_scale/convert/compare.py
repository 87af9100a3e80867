"""How far two sets of weights are apart, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.config.schema import FREE_MODEL_KEYS
from hg_scale.convert.source import WeightSource, pieces


@dataclass(frozen=True)
class Difference:
    """Of one tensor: the largest of an element, and the root of the mean squares of both sides.

    `unequal` counts elements that are not bit for bit the same number; NaN equals nothing.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    largest: float
    unequal: int
    rms: float  # of the difference
    scale: float  # of the first side

    @property
    def relative(self) -> float:
        """rms of the difference over that of the first side."""
        return self.rms / self.scale if self.scale else (0.0 if self.rms == 0 else float("inf"))


def require_same_model(a: WeightSource, b: WeightSource) -> None:
    """Raise CheckpointError listing the keys in which the models differ."""
    ours, theirs = a.model.model_dump(), b.model.model_dump()
    keys = [k for k in ours if k not in FREE_MODEL_KEYS and ours[k] != theirs[k]]
    if keys:
        told = ", ".join(f"model.{k} ({ours[k]!r} and {theirs[k]!r})" for k in keys)
        raise CheckpointError(f"{a.path} and {b.path}: of different models: {told}")


def tensor_differences(
    a: WeightSource, b: WeightSource, workers: int, report: ProgressReporter
) -> Iterator[Difference]:
    """One a tensor, in the model's order; Adam's moments too where both sides have them.

    Raises CheckpointError where the models differ in shape.
    """
    require_same_model(a, b)
    kinds = [kind for kind in a.kinds if kind in b.kinds]
    todo = [(name, kind) for kind in kinds for name in a.shapes]
    report.begin("comparing", 8 * len(kinds) * a.parameters)
    a.close()
    b.close()
    for (name, _), difference in run_jobs(Compare(a, b), todo, workers):
        report.advance(8 * prod(a.shapes[name]))
        yield difference


@dataclass(frozen=True)
class Compare:
    """Compares one tensor; sent to the workers."""

    a: WeightSource
    b: WeightSource

    def __call__(self, item: tuple[str, str]) -> Difference:
        name, kind = item
        shape = self.a.shapes[name]
        largest, unequal, squares, scale = 0.0, 0, 0.0, 0.0
        for _, start, stop in pieces(name, shape):
            x = self.a.read(name, kind, start, stop)
            y = self.b.read(name, kind, start, stop)
            unequal += int((x != y).sum())
            difference = x.double().sub_(y)
            piece = float(difference.abs().max())
            largest = piece if not piece <= largest else largest  # NaN stays
            squares += float(torch.dot(difference, difference))
            scale += float(x.double().square().sum())
        size = prod(shape)
        return Difference(
            name, kind, shape, largest, unequal, sqrt(squares / size), sqrt(scale / size)
        )
