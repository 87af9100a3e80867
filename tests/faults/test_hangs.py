"""Runs that hang, or of which a rank dies, end by themselves, with 76, and say why."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hg_scale.exit_codes import LOST
from hg_scale.training.monitoring.status import status_of
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


def the_line(told: str, run: Path) -> str:
    """The watchdog's one line, which is in the run folder, too."""
    lines = [line for line in told.splitlines() if "to be started again" in line]
    assert len(lines) == 1, told
    (record,) = map(json.loads, (run / "watchdog.jsonl").read_text().splitlines())
    assert record["line"] == lines[0]
    assert re.match(r"step 6 takes \S+ s, \S+ x the usual \S+ s: rank ", lines[0])
    assert lines[0].endswith(END.format(run=run))
    assert "Traceback" not in told
    return lines[0]


def stacks(run: Path, rank: int) -> str:
    return (run / "stacks" / "step-6" / f"rank-{rank:05}.txt").read_text()


@pytest.mark.parametrize(
    "fault, words, function",
    [
        ("sleep rank=1 step=6", r"rank 1 \(\S+\) has not begun its forward pass;", "train_step"),
        ("stall rank=0 step=6", r"rank 0 \(\S+\) is still reading data;", "next_batch"),
    ],
)
def test_a_rank_that_hangs_is_named(
    fault: str, words: str, function: str, forks: Forks, config: Path, tmp_path: Path
) -> None:
    found = run_with_fault(forks, fault, config, tmp_path, *QUICK)
    run = tmp_path / "run"
    assert found.codes == [LOST, LOST], found.all_told
    assert re.search(words, the_line(found.all_told, run))
    guilty = int(fault.split("rank=")[1][0])
    assert function in stacks(run, guilty)
    assert "all_reduce" in stacks(run, 1 - guilty) or "backward" in stacks(run, 1 - guilty)
    assert not list((run / "ranks").glob("*.stacks"))
    status = status_of(run)
    assert status.errors[-1].startswith("watchdog, 0:00:") and "rank " in status.errors[-1]


@pytest.mark.parametrize("fault", ["freeze", "hold"])
def test_a_rank_that_cannot_speak_is_named_by_the_others(
    fault: str, forks: Forks, config: Path, tmp_path: Path
) -> None:
    """Its host is gone, or it hangs in C and lets no other thread run; srun or so ends it then."""
    found = run_with_fault(forks, f"{fault} rank=0 step=6", config, tmp_path, *QUICK, never_end=[0])
    assert found.codes == [KILLED, LOST], found.all_told
    line = the_line(found.told[1], tmp_path / "run")
    assert re.search(r": rank 0 \(\S+\) has sent no heartbeat for \d+ s;", line)
    if fault == "hold":
        assert "keep_interpreter" in stacks(tmp_path / "run", 0)


def test_a_run_goes_on_after_it(forks: Forks, config: Path, tmp_path: Path) -> None:
    found = run_with_fault(forks, "sleep rank=1 step=6", config, tmp_path, *QUICK)
    assert found.codes == [LOST, LOST]
    again = run_with_fault(forks, "sleep rank=5", config, tmp_path, *QUICK)
    assert again.codes == [0, 0] and "resumed at step 4" in again.told[0]


def test_a_rank_that_dies(forks: Forks, config: Path, tmp_path: Path) -> None:
    """The others say so in a line, and the next start goes on."""
    sets = (*QUICK, "checkpoint.async=false")  # one that is being written dies with the rank
    found = run_with_fault(forks, "die rank=1 step=6", config, tmp_path, *sets)
    assert found.codes == [LOST, KILLED], found.all_told
    line = found.told[0].splitlines()[-1]
    assert line.startswith("rank 0 lost its connection to the others at step 6: ")
    assert line.endswith("; the job is to be started again") and "Traceback" not in found.all_told
    again = run_with_fault(forks, "die rank=5", config, tmp_path, *sets)
    assert again.codes == [0, 0] and "resumed at step 4" in again.told[0]
