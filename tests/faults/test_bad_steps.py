"""A rank that returns NaN, a loss that leaps, a disk that fills: training goes on, or gives up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hg_scale.checkpoint.find import checkpoints_in, find_latest
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.exit_codes import DONE, GAVE_UP
from tests.convert.verified import verify
from tests.disks import Mount, mount
from tests.faults.worlds import run_with_fault
from tests.forks import Forks
from tests.runs import curve, records

__all__ = ["mount"]
LAYOUTS = {"data": ["parallel.zero_stage=1"], "pipeline": ["parallel.pipeline=2"]}
NEVER = "raise step=999"


def lines(told: str, word: str) -> list[str]:
    return [line for line in told.splitlines() if word in line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_returns_nan(forks: Forks, config: Path, tmp_path: Path, layout: str) -> None:
    """One line says which; the step is counted, and noted where no step is logged."""
    sets = (*LAYOUTS[layout], "logging.every=6", "checkpoint.every=3")
    found = run_with_fault(forks, "nan rank=1 step=3", config, tmp_path, *sets)
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.all_told, "skipped")
    begin = "warning (rank 0): step 3 skipped: the loss is nan on rank 1; gradients of "
    assert line.startswith(begin) and line.endswith(" more")
    run = tmp_path / "run"
    assert [step for step, _, _ in curve(run)] == [1, 6]
    (noted,) = [r for r in records(run) if "skipped" in r]
    assert noted["step"] == 3 and noted["skipped"] in line and noted["skipped_steps"] == 1
    last = [r for r in records(run) if "loss" in r][-1]
    assert last["skipped_steps"] == 1 and math.isfinite(last["loss"])
    for step, path in checkpoints_in(run / "checkpoints").items():
        verify(path)
        manifest = read_manifest(path)
        assert manifest["progress"]["skipped"] == 1
        assert manifest["optimizer_step"] == step - 1
        assert manifest["guard"]["skipped"] == [3]


def test_too_many_end_the_run(forks: Forks, config: Path, tmp_path: Path) -> None:
    """With code 77, told once, naming the checkpoint from before them; a later one is whole too."""
    sets = ("checkpoint.every=2", "guard.max_skipped=2", "training.steps=9")
    found = run_with_fault(forks, "nan_from rank=1 step=3", config, tmp_path, *sets)
    assert found.codes == [GAVE_UP, GAVE_UP]
    (line,) = lines(found.all_told, "gave up")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert line.startswith(
        "gave up after step 5: 3 of the last 5 steps were skipped, more than guard.max_skipped "
        "= 2, the last: the loss is nan on rank 1; "
    )
    assert f"the last good checkpoint is {checkpoints / 'step-00000002'}; start a new run" in line
    newest = find_latest(checkpoints)
    assert newest and newest.name == "step-00000004"
    verify(newest)
    assert not lines(found.all_told, "Traceback")

    # Started again it goes on from step 4, which remembers the bad steps.
    again = run_with_fault(forks, "nan_from rank=1 step=3", config, tmp_path, *sets)
    assert again.codes == [GAVE_UP, GAVE_UP]
    assert "gave up after step 5: 3 of the last 5 steps" in again.all_told

    # What the line advises: from the good one, here without the fault.
    (tmp_path / "new").mkdir()
    good = f"checkpoint.start_from={checkpoints / 'step-00000002'}"
    mended = run_with_fault(forks, NEVER, config, tmp_path / "new", *sets, good)
    assert mended.codes == [DONE, DONE] and "resumed at step 2" in mended.all_told


def test_a_loss_that_leaps(forks: Forks, config: Path, tmp_path: Path) -> None:
    """It is finite, and skipped where a sigma is set; without one the step is taken."""
    sets = ("training.steps=12", "guard.window=8")
    on = (*sets, "guard.spike_sigma=6.0")
    found = run_with_fault(forks, "spike step=9", config, tmp_path, *on)
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.all_told, "skipped")
    assert line.startswith("warning (rank 0): step 9 skipped: loss ")
    assert " sigma above the last 8, " in line

    (tmp_path / "off").mkdir()
    found = run_with_fault(forks, "spike step=9", config, tmp_path / "off", *sets)
    assert found.codes == [DONE, DONE] and not lines(found.all_told, "skipped")


def test_a_disk_that_fills(forks: Forks, mount: Mount, config: Path, tmp_path: Path) -> None:
    """That checkpoint is lost, older ones stay, and training is as if nothing had been."""
    checkpoints = tmp_path / "run" / "checkpoints"
    mount(checkpoints, 16 << 20)
    found = run_with_fault(forks, "fill rank=0 step=4", config, tmp_path, "checkpoint.every=2")
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.all_told, "not saved")
    assert line.startswith("warning (rank 0): step 4 not saved: rank ")
    assert "No space left on device" in line
    assert line.endswith("; older checkpoints are kept, the run goes on")
    assert sorted(checkpoints_in(checkpoints)) == [2, 6]
    for path in checkpoints_in(checkpoints).values():
        verify(path)

    (tmp_path / "other").mkdir()
    run_with_fault(forks, NEVER, config, tmp_path / "other", "checkpoint.every=2")
    assert curve(tmp_path / "run") == curve(tmp_path / "other" / "run")
