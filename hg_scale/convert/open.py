"""Which kind of weights a path leads to."""

from __future__ import annotations

from pathlib import Path

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import MANIFEST, find_latest
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.deepspeed_files import (
    LATEST,
    TORCH_FILE,
    TORCH_INDEX,
    ZERO,
    ConsolidatedSource,
    UniversalSource,
)
from hg_scale.convert.source import (
    CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    CheckpointSource,
    ExportSource,
    GoldenSource,
    WeightSource,
)


def open_source(path: Path, model: ModelConfig | None = None) -> WeightSource:
    """A checkpoint, a run's newest one, an export, a golden file, or DeepSpeed's.

    `model` is for DeepSpeed's, which do not say it. Raises CheckpointError where it is none of
    these or is damaged.
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
        return open_checkpoint(path)
    if has(LATEST, ZERO):
        return UniversalSource(path, model)
    if model is None and has(CONFIG) and has(SAFETENSORS, SAFETENSORS_INDEX):
        return ExportSource(path)
    if has(SAFETENSORS, SAFETENSORS_INDEX, TORCH_FILE, TORCH_INDEX):
        return ConsolidatedSource(path, model)
    raise CheckpointError(
        f"{path}: expected a run, a checkpoint ({MANIFEST}), an export ({CONFIG}, {SAFETENSORS}), "
        f"a golden file or DeepSpeed's ({LATEST}, {TORCH_FILE})"
    )


def open_checkpoint(path: Path) -> CheckpointSource:
    """A checkpoint folder, or a run's newest whole one. Raises CheckpointError."""
    if (path / "checkpoints").is_dir():
        newest = find_latest(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{path / 'checkpoints'}: holds no checkpoint")
        return CheckpointSource(newest)
    return CheckpointSource(path)


def is_export(path: Path) -> bool:
    """Whether a folder is an export and not a checkpoint or a run."""
    weights = any((path / name).exists() for name in (SAFETENSORS, SAFETENSORS_INDEX))
    return weights and (path / CONFIG).is_file() and not (path / MANIFEST).exists()
