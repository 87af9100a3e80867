"""The mean of several sets of weights, as a source of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.convert.source import WeightSource, require_same_model


class AverageSource(WeightSource):
    """The mean of weights, taken in fp64. Without moments: those of a mean fit no training run."""

    format_name = "average"

    def __init__(self, sources: Sequence[WeightSource]) -> None:
        """Raises CheckpointError if they are of different models."""
        first = sources[0]
        for other in sources[1:]:
            require_same_model(first, other)
        super().__init__((sources,), first.path, first.model, first.shapes)
        self._sources = sources
        self.step = max(source.step for source in sources)
        self.tokenizer = first.tokenizer

    @property
    def paths(self) -> str:
        return f"the mean of {', '.join(source.paths for source in self._sources)}"

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        for source in self._sources:
            total += source.read(name, kind, start, stop)
        return (total / len(self._sources)).float()

    def require_unchanged(self, workers: int, report: ProgressReporter) -> None:
        for source in self._sources:
            source.require_unchanged(workers, report)

    def close(self) -> None:
        for source in self._sources:
            source.close()
