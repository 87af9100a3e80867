"""A NaN on one rank, a loss spike, a full disk: training goes on, or gives up."""

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


def lines(output: str, word: str) -> list[str]:
    return [line for line in output.splitlines() if word in line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_on_one_rank_skips_the_step(
    forks: Forks, config: Path, tmp_path: Path, layout: str
) -> None:
    """One line names the rank; the step is counted, and logged although no step is due."""
    sets = (*LAYOUTS[layout], "logging.every=6", "checkpoint.every=3")
    found = run_with_fault(forks, "nan rank=1 step=3", config, tmp_path, *sets)
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.output, " skipped: ")
    begin = "warning (rank 0): step 3 skipped: the loss is nan on rank 1; gradients of "
    assert line.startswith(begin) and line.endswith(" more")
    run = tmp_path / "run"
    assert [step for step, _, _ in curve(run)] == [1, 6]
    (record,) = [r for r in records(run) if "skipped" in r]
    assert record["step"] == 3 and record["skipped"] in line and record["skipped_steps"] == 1
    last = [r for r in records(run) if "loss" in r][-1]
    assert last["skipped_steps"] == 1 and math.isfinite(last["loss"])
    for step, path in checkpoints_in(run / "checkpoints").items():
        verify(path)
        manifest = read_manifest(path)
        assert manifest["progress"]["skipped"] == 1
        assert manifest["optimizer_step"] == step - 1
        assert manifest["guard"]["skipped"] == [3]


def test_too_many_skipped_steps_end_the_run(forks: Forks, config: Path, tmp_path: Path) -> None:
    """With code 77 and one line that names the checkpoint before them; a later one is complete."""
    sets = ("checkpoint.every=2", "guard.max_skipped=2", "training.steps=9")
    found = run_with_fault(forks, "nan_from rank=1 step=3", config, tmp_path, *sets)
    assert found.codes == [GAVE_UP, GAVE_UP]
    (line,) = lines(found.output, "gave up")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert line.startswith(
        "gave up after step 5: 3 of the last 5 steps were skipped, more than guard.max_skipped "
        "= 2; the last: the loss is nan on rank 1; "
    )
    assert f"the last good checkpoint is {checkpoints / 'step-00000002'}; start a new run" in line
    newest = find_latest(checkpoints)
    assert newest and newest.name == "step-00000004"
    verify(newest)
    assert not lines(found.output, "Traceback")

    # A restart resumes from step 4, whose checkpoint contains the bad steps.
    again = run_with_fault(forks, "nan_from rank=1 step=3", config, tmp_path, *sets)
    assert again.codes == [GAVE_UP, GAVE_UP]
    assert "gave up after step 5: 3 of the last 5 steps" in again.output

    # What the line advises: start from the good checkpoint, here without the fault.
    (tmp_path / "new").mkdir()
    good = f"checkpoint.start_from={checkpoints / 'step-00000002'}"
    fixed = run_with_fault(forks, NEVER, config, tmp_path / "new", *sets, good)
    assert fixed.codes == [DONE, DONE] and "resumed at step 2" in fixed.output


def test_a_loss_spike_is_skipped_with_spike_sigma(
    forks: Forks, config: Path, tmp_path: Path
) -> None:
    """The loss is finite; without spike_sigma the step is taken."""
    sets = ("training.steps=12", "guard.window=8")
    on = (*sets, "guard.spike_sigma=6.0")
    found = run_with_fault(forks, "spike step=9", config, tmp_path, *on)
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.output, " skipped: ")
    assert line.startswith("warning (rank 0): step 9 skipped: loss ")
    assert " sigma above the last 8, " in line

    (tmp_path / "off").mkdir()
    found = run_with_fault(forks, "spike step=9", config, tmp_path / "off", *sets)
    assert found.codes == [DONE, DONE] and not lines(found.output, " skipped: ")


def test_a_full_disk_loses_one_checkpoint(
    forks: Forks, mount: Mount, config: Path, tmp_path: Path
) -> None:
    """Older checkpoints stay, and training is unaffected."""
    checkpoints = tmp_path / "run" / "checkpoints"
    mount(checkpoints, 16 << 20)
    found = run_with_fault(forks, "fill rank=0 step=4", config, tmp_path, "checkpoint.every=2")
    assert found.codes == [DONE, DONE]
    (line,) = lines(found.output, "not saved")
    assert line.startswith("warning (rank 0): step 4 not saved: rank ")
    assert "No space left on device" in line
    assert line.endswith("; older checkpoints are kept, the run continues")
    assert sorted(checkpoints_in(checkpoints)) == [2, 6]
    for path in checkpoints_in(checkpoints).values():
        verify(path)

    (tmp_path / "other").mkdir()
    run_with_fault(forks, NEVER, config, tmp_path / "other", "checkpoint.every=2")
    assert curve(tmp_path / "run") == curve(tmp_path / "other" / "run")
