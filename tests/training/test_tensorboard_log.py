"""Scalars for TensorBoard; its package is optional, so torch's writer is replaced."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hg_scale.errors import UserError
from hg_scale.training.tensorboard_log import TensorBoardLog, scalars

RECORD = {
    "step": 3, "time": 1e9, "start": 1, "job": "7", "loss": 0.5, "skipped": "nan", "mfu": None,
    "epochs": {"a": 1.5, "b": None}, "weight_norm_by_level": [2.0, 3], "slowest_rank": 1,
}  # fmt: skip


def test_numbers_are_scalars_with_their_path_as_the_tag() -> None:
    assert list(scalars(RECORD)) == [
        ("loss", 0.5), ("epochs/a", 1.5), ("weight_norm_by_level/0", 2.0),
        ("weight_norm_by_level/1", 3.0), ("slowest_rank", 1.0),
    ]  # fmt: skip


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^logging.tensorboard: .*hg-scale\[tensorboard\]") as info:
        TensorBoardLog(tmp_path, 0, print)
    assert "\n" not in str(info.value)


def test_records_are_written_until_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int, max_queue: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            if step == 5:
                raise OSError("No space left\non device")
            calls.append((tag, value, step))

        def close(self) -> None:
            calls.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    warnings: list[str] = []
    log = TensorBoardLog(tmp_path, 2, warnings.append)
    log.log({"step": 3, "loss": 0.5})
    log.close()
    for step in (5, 6):
        log.log({"step": step, "loss": 0.25, "mfu": 0.5})
    assert calls == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3), "closed"]
    assert warnings == ["tensorboard disabled: No space left on device; see metrics.jsonl"]
