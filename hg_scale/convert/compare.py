"""The difference between two sets of weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch

from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.convert.source import WeightSource, parameter_chunks, require_same_model


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two sources, A and B."""

    name: str
    kind: str
    shape: tuple[int, ...]
    largest: float  # absolute difference of an element
    unequal: int  # elements that are not the same number; NaN equals nothing
    rms: float  # of the difference
    rms_a: float  # of A

    @property
    def relative(self) -> float:
        """rms of the difference over that of A."""
        return self.rms / self.rms_a if self.rms_a else (0.0 if self.rms == 0 else float("inf"))


def tensor_differences(
    a: WeightSource, b: WeightSource, workers: int, report: ProgressReporter
) -> Iterator[TensorDifference]:
    """Yield the difference of each tensor, in the model's order; moments too if both have them.

    Raises CheckpointError if the models differ in shape.
    """
    require_same_model(a, b)
    kinds = [kind for kind in a.kinds if kind in b.kinds]
    tensors = [(name, kind) for kind in kinds for name in a.shapes]
    report.begin("comparing", 8 * len(kinds) * a.parameters)
    a.close()
    b.close()
    for (name, _), difference in run_jobs(CompareTensor(a, b), tensors, workers):
        report.advance(8 * prod(a.shapes[name]))
        yield difference


@dataclass(frozen=True)
class CompareTensor:
    """Job: compare one tensor of two sources."""

    a: WeightSource
    b: WeightSource

    def __call__(self, item: tuple[str, str]) -> TensorDifference:
        name, kind = item
        shape = self.a.shapes[name]
        largest, unequal, squares, squares_a = 0.0, 0, 0.0, 0.0
        for _, start, stop in parameter_chunks(name, shape):
            x = self.a.read(name, kind, start, stop)
            y = self.b.read(name, kind, start, stop)
            unequal += int((x != y).sum())
            difference = x.double().sub_(y)
            chunk = float(difference.abs().max())
            largest = chunk if not chunk <= largest else largest  # NaN stays
            squares += float(torch.dot(difference, difference))
            squares_a += float(x.double().square().sum())
        size = prod(shape)
        return TensorDifference(
            name, kind, shape, largest, unequal, sqrt(squares / size), sqrt(squares_a / size)
        )
