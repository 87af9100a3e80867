"""A checkpoint of hg_scale as a source of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hg_scale.checkpoint.checksum import corrupt_files
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.convert.source import WeightSource, parse_model


class CheckpointSource(WeightSource):
    """A checkpoint folder, whichever layout wrote it. Raises CheckpointError if incomplete."""

    format_name = "checkpoint"

    def __init__(self, path: Path) -> None:
        self.reader = CheckpointReader(path)
        self.manifest = manifest = self.reader.manifest
        model = parse_model(manifest["config"]["model"], path)
        super().__init__((path,), path, model, self.reader.shapes)
        self.step, self.optimizer_step = manifest["step"], manifest["optimizer_step"]
        self.progress: dict[str, Any] = manifest["progress"]
        self.kinds = KINDS if manifest.get("moments", True) else KINDS[:1]  # else all zeros
        self.config = manifest["config"]
        # The first manifests name the tokenizer only in the state of the data.
        data = self.progress.get("data") or {}
        self.tokenizer = manifest.get("tokenizer") or data.get("tokenizer") or None

    def require_unchanged(self, workers: int, report: ProgressReporter) -> None:
        for problem in corrupt_files(self.path, self.manifest["files"], workers, report):
            raise CheckpointError(f"{problem}; use another checkpoint")

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        target = Fragment(Slice(name, self.shapes[name]), start, stop - start)
        return self.reader.read(kind, target)
