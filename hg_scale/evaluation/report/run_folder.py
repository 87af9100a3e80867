"""The files of a run folder; old, broken and unfinished runs can be read, too."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import verify_sizes
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.config.data_section import DataConfig, SourceConfig
from hg_scale.config.errors import ConfigError
from hg_scale.config.read import read_tree
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.open import is_export
from hg_scale.errors import UserError
from hg_scale.metrics_file import Columns, read_columns
from hg_scale.model.costs import training_flops_per_token
from hg_scale.run_starts import RunStart, read_starts

Column = NDArray[np.float64]

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_TRAINING = (
    "step", "time", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens",
    "step_seconds", "data_seconds", "data_wait_p99", "tokens_per_second", "mfu", "memory_gib",
    "peak_memory_gib", "skipped_steps", "skipped_windows", "slowest_rank", "slowest_ratio",
    "gpu_utilisation", "gpu_power_watts",
)  # fmt: skip
_VALIDATION = (
    "step", "time", "validation_loss", "validation_bits_per_byte", "validation_tokens",
    "validation_seconds",
)  # fmt: skip
_STOPPED_AFTER = 120.0  # seconds without a record, on top of ten logging intervals


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: `layout` from its manifest, `problem` why it is incomplete or None."""

    name: str
    step: int
    bytes: int
    layout: dict[str, Any]
    problem: str | None

    @property
    def layout_line(self) -> str:
        """The layout as a readable string; empty where the manifest has none."""
        sizes = self.layout
        if not {"tensor", "pipeline", "data", "zero_stage"} <= sizes.keys():
            return ""
        return (
            f"tensor {sizes['tensor']} × pipeline {sizes['pipeline']} × data {sizes['data']}, "
            f"ZeRO {sizes['zero_stage']}"
        )


@dataclass(frozen=True)
class RunFolder:
    """A run: `tree` is its config.json; `training` and `validation` are columns of metrics.jsonl.

    `starts`: of starts.jsonl, which older versions did not write.

    `model` is None and `corpora` empty where this version cannot parse that section of `tree`.
    """

    path: Path
    name: str
    tree: dict[str, Any]
    model: ModelConfig | None
    corpora: tuple[SourceConfig, ...]
    training: dict[str, Column]
    validation: dict[str, Column]
    checkpoints: list[Checkpoint]
    starts: list[RunStart]

    def column(self, key: str) -> Column:
        """A metric at every logged step; NaN where it is null or missing."""
        return self.training[key] if key in self.training else np.full(self.logged, np.nan)

    def validation_column(self, key: str) -> Column:
        """A metric at every validation; NaN where it is null or missing."""
        columns = self.validation
        return columns[key] if key in columns else np.full(len(columns["step"]), np.nan)

    @property
    def logged(self) -> int:
        """The number of logged steps."""
        return len(self.training["step"])

    @property
    def scored_tokens(self) -> int | None:
        """Tokens scored by the last validation with finite bits per byte; None if unknown."""
        known = np.flatnonzero(np.isfinite(self.validation_column("validation_bits_per_byte")))
        scored = self.validation_column("validation_tokens")[known[-1]] if known.size else np.nan
        return int(scored) if np.isfinite(scored) else None

    def setting(self, key: str) -> Any:
        """A configuration value by its dotted key; None where it is missing."""
        node: Any = self.tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        logged = (int(columns["step"][-1:].max(initial=0)) for columns in self._tables)
        return max([0, *logged, *(checkpoint.step for checkpoint in self.checkpoints)])

    @property
    def _tables(self) -> tuple[dict[str, Column], ...]:
        return self.training, self.validation

    @property
    def steps(self) -> int | None:
        """The number of steps to train; None if unknown."""
        steps = self.setting("training.steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token; NaN where the model section cannot be parsed."""
        return training_flops_per_token(self.model) if self.model else float("nan")

    @property
    def state(self) -> str:
        """`not started`, `finished`, `running` or `stopped`, by the time of the last record."""
        if not self.step:
            return "not started"
        if self.steps is not None and self.step >= self.steps:
            return "finished"
        times = np.concatenate([columns["time"] for columns in self._tables])
        if not np.isfinite(times).any():
            return "stopped"
        waits = np.diff(self.column("time"))
        usual = float(np.nanmedian(waits)) if np.isfinite(waits).any() else 0.0
        quiet = time.time() - float(np.nanmax(times))
        return "running" if quiet < _STOPPED_AFTER + 10 * usual else "stopped"

    @property
    def layout_changes(self) -> list[tuple[Checkpoint, Checkpoint]]:
        """Pairs of consecutive checkpoints with different layouts: resumed from the first one."""
        known = [checkpoint for checkpoint in self.checkpoints if checkpoint.layout_line]
        pairs = zip(known, known[1:], strict=False)
        return [(a, b) for a, b in pairs if a.layout != b.layout]


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Read the runs, each with a unique name. Raises UserError where a folder is not a run."""
    unique = [Path(p) for p in dict.fromkeys(map(os.path.realpath, folders))]
    return [_read_run(path, name) for path, name in zip(unique, short_names(unique), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes that distinguish the paths."""
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            name = "/".join(path.parts[-length:])
            if sum("/".join(other.parts[-length:]) == name for other in paths) == 1:
                break
        names.append(name)
    return names


def _read_run(path: Path, name: str) -> RunFolder:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.json")
    if is_export(path):
        raise UserError(f"{path} is an export, not a run folder: name the run it was exported from")
    try:
        tree = read_tree(path / "config.json")
    except ConfigError as error:
        raise UserError(f"{path / 'config.json'}: {error.problems[0].message}") from None
    metrics = path / "metrics.jsonl"
    tables = read_columns(metrics, {"loss": _TRAINING, "validation_loss": _VALIDATION}, _unreadable)
    training, validation = (_by_step(table) for table in tables.values())
    checkpoints = sorted(_checkpoints(path / "checkpoints"), key=lambda c: c.step)
    model, corpora = _model(tree), _corpora(tree)
    try:
        starts = read_starts(path)
    except OSError as error:
        raise _unreadable(error) from None
    return RunFolder(path, name, tree, model, corpora, training, validation, checkpoints, starts)


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _by_step(table: Columns) -> dict[str, Column]:
    """Return the columns by step, in order; of several records of a step, the last one counts."""
    steps = _column(table, "step")
    _, last = np.unique(steps[::-1], return_index=True)
    order = len(steps) - 1 - last
    return {key: np.frombuffer(values, np.float64)[order] for key, values in table.items()}


def _column(table: Columns, key: str) -> Column:
    """Return a column as an array that shares its memory."""
    return np.frombuffer(table[key], np.float64)


def _checkpoints(folder: Path) -> Iterator[Checkpoint]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if not match:
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            problem = str(error).removeprefix(f"{path}/")
            yield Checkpoint(path.name, int(match[1]), 0, {}, problem)
            continue
        size = sum(int(file.get("bytes", 0)) for file in manifest["files"])
        layout = manifest.get("layout")
        layout = layout if isinstance(layout, dict) else {}
        yield Checkpoint(path.name, int(match[1]), size, layout, verify_sizes(path))


def _model(tree: dict[str, Any]) -> ModelConfig | None:
    try:
        return ModelConfig.model_validate(tree.get("model", {}))
    except ValidationError:
        return None


def _corpora(tree: dict[str, Any]) -> tuple[SourceConfig, ...]:
    """Return the corpora; other keys are ignored, since another version may have written them."""
    section = tree.get("data")
    try:
        data = DataConfig.model_validate(
            {key: value for key, value in section.items() if key in ("path", "sources")}
            if isinstance(section, dict)
            else {}
        )
    except ValidationError:
        return ()
    return tuple(data.corpora)
