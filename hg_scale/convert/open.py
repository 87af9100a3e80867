"""Open the weights at a path, whichever format they are in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest
from hg_scale.checkpoint.manifest import MANIFEST
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.checkpoint_source import CheckpointSource
from hg_scale.convert.deepspeed_files import (
    LATEST_UNIVERSAL,
    TORCH_FILE,
    TORCH_INDEX,
    ZERO_FOLDER,
    ConsolidatedSource,
    UniversalSource,
)
from hg_scale.convert.export_source import CONFIG, SAFETENSORS, SAFETENSORS_INDEX, ExportSource
from hg_scale.convert.reference import GoldenSource
from hg_scale.convert.source import WeightSource


def open_source(
    path: Path, model: ModelConfig | None = None, report: Callable[[str], None] = lambda _: None
) -> WeightSource:
    """Open a checkpoint, a run's newest one, an export, a golden file, or DeepSpeed's files.

    model: for DeepSpeed's files, which do not contain it. report: receives a line for each newer
    checkpoint of a run that is incomplete and skipped. Raises CheckpointError if the path is
    none of these, or is incomplete.
    """

    def has(*names: str) -> bool:
        return any((path / name).exists() for name in names)

    if path.is_file():
        if path.suffix == ".npz":
            return GoldenSource(path)
        return ConsolidatedSource(path, model)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if has(MANIFEST) or any(path.glob("rank-*.safetensors")):
        return CheckpointSource(path)
    if has("checkpoints"):
        return open_checkpoint(path, report)
    if has(LATEST_UNIVERSAL, ZERO_FOLDER):
        return UniversalSource(path, model)
    if model is None and has(CONFIG) and has(SAFETENSORS, SAFETENSORS_INDEX):
        return ExportSource(path)
    if has(SAFETENSORS, SAFETENSORS_INDEX, TORCH_FILE, TORCH_INDEX):
        return ConsolidatedSource(path, model)
    raise CheckpointError(
        f"{path}: expected a run, a checkpoint ({MANIFEST}), an export ({CONFIG}, {SAFETENSORS}), "
        f"a golden file or DeepSpeed's ({LATEST_UNIVERSAL}, {TORCH_FILE})"
    )


def open_checkpoint(path: Path, report: Callable[[str], None] = lambda _: None) -> CheckpointSource:
    """Open a checkpoint folder, or the newest complete one of a run; `report` as `open_source`.

    Raises CheckpointError.
    """
    if (path / "checkpoints").is_dir():
        newest = find_latest(path / "checkpoints", report)
        if newest is None:
            raise CheckpointError(f"{path / 'checkpoints'}: holds no checkpoint")
        return CheckpointSource(newest)
    return CheckpointSource(path)


def is_export(path: Path) -> bool:
    """Return whether a folder is an export, and not a checkpoint or a run."""
    weights = any((path / name).exists() for name in (SAFETENSORS, SAFETENSORS_INDEX))
    return weights and (path / CONFIG).is_file() and not (path / MANIFEST).exists()
