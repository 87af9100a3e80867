"""Runs that hang, or lose a rank, end by themselves with 76 and report why."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hg_scale.exit_codes import LOST
from hg_scale.training.monitoring.status import read_status
from tests.faults.worlds import run_with_fault
from tests.forks import KILLED, Forks

QUICK = (
    "watchdog.at_least=5",
    "watchdog.factor=2",
    "watchdog.first=600",
    "watchdog.pause=600",
    "training.steps=9",
    "checkpoint.every=4",
)
END = "; stacks in {run}/stacks/step-6; the job is to be started again"


def watchdog_line(output: str, run: Path) -> str:
    """The one line of the watchdog, which is also in the run folder."""
    lines = [line for line in output.splitlines() if "to be started again" in line]
    assert len(lines) == 1, output
    (record,) = map(json.loads, (run / "watchdog.jsonl").read_text().splitlines())
    assert record["line"] == lines[0]
    assert re.match(r"step 6 takes \S+ s, \S+ x the usual \S+ s: rank ", lines[0])
    assert lines[0].endswith(END.format(run=run))
    assert "Traceback" not in output
    return lines[0]


def stacks(run: Path, rank: int) -> str:
    return (run / "stacks" / "step-6" / f"rank-{rank:05}.txt").read_text()


@pytest.mark.parametrize(
    "fault, pattern, function",
    [
        ("sleep rank=1 step=6", r"rank 1 \(\S+\) has not begun its forward pass;", "train_step"),
        ("stall rank=0 step=6", r"rank 0 \(\S+\) is still reading data;", "next_batch"),
    ],
)
def test_a_rank_that_hangs_is_named(
    fault: str, pattern: str, function: str, forks: Forks, config: Path, tmp_path: Path
) -> None:
    found = run_with_fault(forks, fault, config, tmp_path, *QUICK)
    run = tmp_path / "run"
    assert found.codes == [LOST, LOST], found.output
    assert re.search(pattern, watchdog_line(found.output, run))
    stalled = int(fault.split("rank=")[1][0])
    assert function in stacks(run, stalled)
    waiting = stacks(run, 1 - stalled)
    assert "all_reduce" in waiting or "backward" in waiting
    assert not list((run / "ranks").glob("*.stacks"))
    status = read_status(run)
    assert status.errors[-1].startswith("watchdog, 0:00:") and "rank " in status.errors[-1]


@pytest.mark.parametrize("fault", ["freeze", "hold"])
def test_a_rank_that_cannot_report_is_named_by_the_others(
    fault: str, forks: Forks, config: Path, tmp_path: Path
) -> None:
    """Its host is gone, or it hangs in C with the interpreter lock; the launcher ends it later."""
    found = run_with_fault(forks, f"{fault} rank=0 step=6", config, tmp_path, *QUICK, never_end=[0])
    assert found.codes == [KILLED, LOST], found.output
    line = watchdog_line(found.outputs[1], tmp_path / "run")
    assert re.search(r": rank 0 \(\S+\) has sent no heartbeat for \d+ s;", line)
    if fault == "hold":
        assert "keep_interpreter" in stacks(tmp_path / "run", 0)


def test_a_run_resumes_after_a_hang(forks: Forks, config: Path, tmp_path: Path) -> None:
    found = run_with_fault(forks, "sleep rank=1 step=6", config, tmp_path, *QUICK)
    assert found.codes == [LOST, LOST]
    again = run_with_fault(forks, "sleep rank=5", config, tmp_path, *QUICK)
    assert again.codes == [0, 0] and "resumed at step 4" in again.outputs[0]


def test_a_killed_rank_ends_the_others(forks: Forks, config: Path, tmp_path: Path) -> None:
    """With one line, and the next start resumes."""
    sets = (*QUICK, "checkpoint.async=false")  # an asynchronous save would die with the rank
    found = run_with_fault(forks, "die rank=1 step=6", config, tmp_path, *sets)
    assert found.codes == [LOST, KILLED], found.output
    line = found.outputs[0].splitlines()[-1]
    assert line.startswith("rank 0 lost its connection to the others at step 6: ")
    assert line.endswith("; the job is to be started again") and "Traceback" not in found.output
    again = run_with_fault(forks, "die rank=5", config, tmp_path, *sets)
    assert again.codes == [0, 0] and "resumed at step 4" in again.outputs[0]
