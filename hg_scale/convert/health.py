"""Statistics of every tensor, and every problem that can be found in weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod, sqrt

import torch

from hg_scale.checkpoint.checksum import corrupt_files
from hg_scale.checkpoint.fragments import coverage_problems
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.checkpoint.mapped_safetensors import header_problem
from hg_scale.convert.checkpoint_source import CheckpointSource
from hg_scale.convert.source import WeightSource, parameter_chunks


@dataclass(frozen=True)
class TensorHealth:
    """Statistics of one tensor: of its finite elements, and counts of the others."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rms: float
    largest: float
    not_finite: int
    negative: int

    @property
    def problem(self) -> str | None:
        """What training never produces: elements that are not finite, negative second moments."""
        if self.not_finite:
            return f"{self.kind} of {self.name}: {self.not_finite:,} elements are not finite"
        if self.kind == "exp_avg_sq" and self.negative:
            return f"exp_avg_sq of {self.name}: {self.negative:,} elements are negative"
        return None


def examine_tensors(
    source: WeightSource, workers: int, report: ProgressReporter
) -> Iterator[TensorHealth]:
    """Yield the statistics of each tensor and kind."""
    tensors = [(name, kind) for kind in source.kinds for name in source.shapes]
    report.begin("reading", 4 * len(source.kinds) * source.parameters)
    source.close()
    for (name, _), health in run_jobs(ExamineTensor(source), tensors, workers):
        report.advance(4 * prod(source.shapes[name]))
        yield health


@dataclass(frozen=True)
class ExamineTensor:
    """Job: compute the statistics of one tensor."""

    source: WeightSource

    def __call__(self, item: tuple[str, str]) -> TensorHealth:
        name, kind = item
        shape, squares, largest, not_finite, negative = self.source.shapes[name], 0.0, 0.0, 0, 0
        for _, start, stop in parameter_chunks(name, shape):
            x = self.source.read(name, kind, start, stop)
            low, high = map(float, x.aminmax())
            if not (isfinite(low) and isfinite(high)):
                finite = x.isfinite()
                not_finite += int((~finite).sum())
                x = x[finite]
                low, high = map(float, x.aminmax()) if x.numel() else (0.0, 0.0)
            squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
            largest = max(largest, -low, high)
            negative += int((x < 0).sum()) if low < 0 else 0
        rms = sqrt(squares / prod(shape))
        return TensorHealth(name, kind, shape, rms, largest, not_finite, negative)


def find_problems(source: WeightSource, workers: int, report: ProgressReporter) -> Iterator[str]:
    """Yield every problem: corrupt files, missing or duplicate elements, NaN and infinity.

    Only checkpoints have checksums; of other formats names, shapes and numbers are verified.
    """
    if isinstance(source, CheckpointSource):
        files = source.manifest["files"]
        yield from corrupt_files(source.path, files, workers, report)
        headers = [problem for file in files if (problem := header_problem(source.path, file))]
        yield from (f"{source.path}/{problem}" for problem in headers)
        if source.optimizer_step > source.step:
            found = f"expected at most step = {source.step:,}, found {source.optimizer_step:,}"
            yield f"{source.path}: optimizer_step: {found}"
        by_name = source.reader.fragments
        missing = [name for name in source.shapes if name not in by_name]
        yield from (f"{source.path}: {name} is missing" for name in missing)
        problems = coverage_problems(f for fragments in by_name.values() for f in fragments)
        yield from (f"{source.path}: {problem}" for problem in problems)
        if problems or headers:
            return  # such a tensor cannot be read
    for health in examine_tensors(source, workers, report):
        if health.problem:
            yield f"{source.path}: {health.problem}"
