"""What state weights are in: sums over every tensor, and every fault that can be found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod, sqrt

import torch

from hg_scale.checkpoint.checksum import changed_files
from hg_scale.checkpoint.fragments import cover_problems
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.convert.source import CheckpointSource, WeightSource, pieces


@dataclass(frozen=True)
class Health:
    """Of one tensor; the figures are of its finite elements. `negative`: elements below 0."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rms: float
    largest: float
    not_finite: int
    negative: int

    @property
    def fault(self) -> str | None:
        """What no whole training run leaves behind."""
        if self.not_finite:
            return f"{self.kind} of {self.name}: {self.not_finite:,} elements are not finite"
        if self.kind == "exp_avg_sq" and self.negative:
            return f"exp_avg_sq of {self.name}: {self.negative:,} elements are negative"
        return None


def health_of(source: WeightSource, workers: int, report: ProgressReporter) -> Iterator[Health]:
    """One a tensor and kind."""
    todo = [(name, kind) for kind in source.kinds for name in source.shapes]
    report.begin("reading", 4 * len(source.kinds) * source.parameters)
    source.close()
    for (name, _), health in run_jobs(Examine(source), todo, workers):
        report.advance(4 * prod(source.shapes[name]))
        yield health


@dataclass(frozen=True)
class Examine:
    """Sums over one tensor; sent to the workers."""

    source: WeightSource

    def __call__(self, item: tuple[str, str]) -> Health:
        name, kind = item
        shape, squares, largest, lost, negative = self.source.shapes[name], 0.0, 0.0, 0, 0
        for _, start, stop in pieces(name, shape):
            x = self.source.read(name, kind, start, stop)
            low, high = map(float, x.aminmax())
            if not (isfinite(low) and isfinite(high)):
                finite = x.isfinite()
                lost += int((~finite).sum())
                x = x[finite]
                low, high = map(float, x.aminmax()) if x.numel() else (0.0, 0.0)
            squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
            largest = max(largest, -low, high)
            negative += int((x < 0).sum()) if low < 0 else 0
        return Health(name, kind, shape, sqrt(squares / prod(shape)), largest, lost, negative)


def find_problems(source: WeightSource, workers: int, report: ProgressReporter) -> Iterator[str]:
    """Every fault: bytes that changed, elements missing or there twice, what is not finite.

    A checkpoint has checksums; of an export the names, the shapes and the numbers are checked.
    """
    if isinstance(source, CheckpointSource):
        yield from changed_files(source.path, source.manifest["files"], workers, report)
        written = source.reader.written
        missing = [name for name in source.shapes if name not in written]
        yield from (f"{source.path}: {name} is missing" for name in missing)
        problems = cover_problems(f for fragments in written.values() for f in fragments)
        if problems:
            yield from (f"{source.path}: {problem}" for problem in problems)
            return  # such a tensor cannot be read
    for health in health_of(source, workers, report):
        if health.fault:
            yield f"{source.path}: {health.fault}"
