"""What the files of a run folder say of the run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hg_scale.atomic_write import write_json
from hg_scale.commands.main import main
from hg_scale.errors import UserError
from hg_scale.training.failures import write_end
from hg_scale.training.monitoring import status
from hg_scale.training.monitoring.heartbeat import pid_space
from hg_scale.training.monitoring.status import status_of
from tests.training.monitoring.heartbeats import NOW, make_beats, write_beats
from tests.training.test_check import save


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "queue_state", lambda job: None)


def write(run: Path, name: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / name).write_text(text + '{"half a li')


def step(number: int, time: float) -> dict[str, Any]:
    return {
        "step": number, "loss": 2.5, "bits_per_byte": 3.6067, "tokens_per_second": 31_200.0,
        "mfu": 0.415, "step_seconds": 30.0, "time": time, "skipped_steps": 2,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """At step 10 of 130, 30 s a step, the last one 20 s ago."""
    (tmp_path / "config.json").write_text(json.dumps({"training": {"steps": 130}}))
    held_out = {"step": 8, "validation_loss": 2.0, "validation_bits_per_byte": 2.8854}
    steps = [step(n, NOW - 20 - 30 * (10 - n)) for n in range(1, 11)]
    write(tmp_path, "metrics.jsonl", [*steps[:8], held_out, *steps[8:]])
    return tmp_path


def test_a_run_at_work(run: Path) -> None:
    save(run, 10)
    found = status_of(run, NOW)
    assert found.alive is True
    assert found.lines["state"] == "alive: last line 0:00:20 ago"
    assert found.lines["step"] == "10 of 130"
    assert found.lines["loss"] == "2.5000, 3.6067 bits a byte"
    assert found.lines["speed"] == "31.2k tokens/s, MFU 41.5%"
    assert found.lines["time left"] == "1:00:00"
    assert found.lines["validation"] == "2.8854 bits a byte at step 8"
    assert found.lines["checkpoint"].startswith("step-00000010, ")
    assert found.lines["skipped"].startswith("2 steps")


def test_silence_is_death_after_ten_steps_or_ten_minutes(run: Path) -> None:
    assert status_of(run, NOW + 500).alive is True
    found = status_of(run, NOW + 700)
    assert found.alive is False and "0:12:00 ago, which is too long" in found.lines["state"]
    write(run, "metrics.jsonl", [step(n, NOW - 300 * (10 - n)) for n in range(1, 11)])
    assert status_of(run, NOW + 2900).alive is True
    assert status_of(run, NOW + 3100).alive is False


def test_jobs_restarts_and_last_errors(run: Path) -> None:
    log = run / "hg-train-7.log"
    log.write_text("step 9/130  loss 2.5\nCUDA error: an illegal access\nexit code 76: lost\n")
    first = {"event": "start", "job": "7", "start": 1, "log": str(log), "time": NOW - 900}
    ends = [{**first, "event": "end", "code": code, "requeued": True} for code in (76, 137, 76)]
    starts = [{**first, "start": n} for n in (1, 2, 3, 4)]
    both = [line for pair in zip(starts[:3], ends, strict=True) for line in pair]
    write(run, "jobs.jsonl", both)
    found = status_of(run, NOW)
    assert found.alive is False
    assert found.lines["state"] == (
        "not running: job 7 ended: lost a rank or a node, waiting to start again"
    )
    assert found.errors == ["CUDA error: an illegal access", "exit code 76: lost"]
    write(run, "jobs.jsonl", [*both, {**starts[3], "ends": NOW + 7200}])
    found = status_of(run, NOW)
    assert found.lines["job ends"] == "in 2:00:00"
    assert found.alive is True
    assert found.lines["restarts"] == (
        "3 (2 x lost a rank or a node, 1 x lost a rank or a node (signal 9))"
    )
    assert status_of(run, NOW, last_errors=1).errors == ["exit code 76: lost"]


def test_slurm_s_word_counts_more_than_silence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run, "jobs.jsonl", [{"event": "start", "job": "7", "start": 1, "log": "", "time": NOW}])
    for state, alive in (("RUNNING", True), ("PENDING", False)):
        monkeypatch.setattr(status, "queue_state", lambda job, state=state: state)
        found = status_of(run, NOW + 10_000)
        assert (found.alive, found.lines["state"].split(": ")[1]) == (alive, f"job 7 is {state}")


def test_a_job_that_slurm_itself_requeued_waits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"event": "end", "job": "7", "start": 1, "log": "", "time": NOW, "requeued": False}
    write(run, "jobs.jsonl", [{**ended, "code": 76}])
    for state, words in (("PENDING", ", waiting to start again"), ("COMPLETING", ""), (None, "")):
        monkeypatch.setattr(status, "queue_state", lambda job, state=state: state)
        found = status_of(run, NOW)
        assert found.lines["state"] == f"not running: job 7 ended: lost a rank or a node{words}"


def test_slurm_is_asked_for_one_element_of_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the last one is also that of all of them."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\ncase $3 in --jobs=7_2) echo RUNNING ;; --jobs=7) echo RUNNING; echo PENDING ;; "
        "esac\n"
    )
    squeue.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write(tmp_path, "jobs.jsonl", [{"event": "start", "job": "7_2", "log": "", "time": NOW}])
    found = status_of(tmp_path, NOW)
    assert (found.alive, found.lines["state"]) == (True, "alive: job 7_2 is RUNNING")


def test_heartbeats_say_more_than_silence(run: Path) -> None:
    write_beats(run, make_beats({"step": 11}, {"step": 11}))
    found = status_of(run, NOW)
    assert found.lines["state"] == "alive: last heartbeat 0:00:02 ago"
    assert found.lines["ranks"] == "2 of 2 in step 11, for 0:00:10"
    found = status_of(run, NOW + 5000)
    assert found.alive is False and "ranks" not in found.lines
    assert found.lines["state"].endswith("last heartbeat 1:23:22 ago, which is too long")

    stuck = {"since": NOW - 300, "step_seconds": 30.0}
    data = {**stuck, "work": "data", "turns": 1}
    write_beats(run, make_beats(stuck, data, stuck))
    assert status_of(run, NOW).lines["ranks"] == (
        "2 of 3 in step 120, 1 of 3 reading data for step 120, for 0:05:00; "
        "rank 1 (n1) is still reading data"
    )
    write_beats(run, make_beats({}, {}, {"time": NOW - 100}))
    assert (
        status_of(run, NOW)
        .lines["ranks"]
        .endswith("rank 2 (n2) has given no sign of life for 100 s")
    )
    write_beats(run, make_beats(*[{"ended": True}] * 3))
    assert status_of(run, NOW).lines["state"] == "not running: all ranks ended, 0:00:02 ago"


def test_processes_that_are_no_more_are_missed_at_once(run: Path) -> None:
    """Where one can see them: on another host, or in a container, silence tells it later."""
    with subprocess.Popen(["true"]) as gone:
        pass
    here = {"pid": gone.pid, "pid_space": pid_space()}
    write_beats(run, make_beats(here, here))
    found = status_of(run, NOW)
    assert found.alive is False
    words = "rank 0 (n0), rank 1 (n1) ended without a word, last heartbeat 0:00:02 ago"
    assert found.lines["state"] == f"not running: {words}"
    write_beats(run, make_beats(*[{**here, "hung": True}] * 2))
    assert "rank 1 (n1) ended by the watchdog, " in status_of(run, NOW).lines["state"]
    write_beats(run, make_beats(here, {**here, "pid_space": "elsewhere"}))
    assert status_of(run, NOW).alive is True
    write_beats(run, make_beats(here, {**here, "pid": os.getpid()}))
    assert status_of(run, NOW).alive is True
    write_beats(run, make_beats(*[{**here, "ended": True}] * 2))
    assert status_of(run, NOW).lines["state"].startswith("not running: all ranks ended, ")


def test_what_ended_a_run(run: Path) -> None:
    write_beats(run, make_beats(*[{"ended": True}] * 2))
    write_end(run, 1, 77, "gave up after step 9")
    write_end(run, 2, 1, "of an earlier start with more ranks")
    assert status_of(run, NOW).errors == ["rank 1 ended with exit code 77: gave up after step 9"]
    write_beats(run, make_beats({}, {}))
    assert status_of(run, NOW).errors == []


def test_a_run_that_starts(tmp_path: Path) -> None:
    write_beats(tmp_path, make_beats(*[{"step": 0, "phase": "start"}] * 2))
    found = status_of(tmp_path, NOW)
    assert found.alive is True and found.lines["ranks"] == "2 of 2 starting, for 0:00:10"


def test_a_job_that_was_refused_beside_one_at_work(run: Path) -> None:
    end = {"job": 8, "start": 1, "event": "end", "log": "", "code": 1, "requeued": False}
    write_beats(run, make_beats({}, {}))
    for ago, alive in ((60, True), (1, False)):
        write(run, "jobs.jsonl", [{**end, "time": NOW - ago}])
        assert status_of(run, NOW).alive is alive


def test_slow_ranks_and_what_the_watchdog_said(run: Path) -> None:
    write_beats(run, make_beats({}, {}))
    assert "slow ranks" not in status_of(run, NOW).lines
    row = {"rank": 0, "data_seconds": 0.0, "forward_seconds": 0.25, "ratio": 1.0}
    slow = {"rank": 1, "data_seconds": 0.125, "forward_seconds": 0.25, "ratio": 1.5}
    table = {"step": 120, "threshold": 1.3, "ranks": [row, slow]}
    write_json(run / "ranks" / "stragglers.json", table)
    assert status_of(run, NOW).lines["slow ranks"] == (
        "rank 1 (n1) 1.50 x the median (data 0.125 s, forward 0.25 s a step), at step 120"
    )
    write_json(run / "ranks" / "stragglers.json", {**table, "threshold": 2.0})
    assert status_of(run, NOW).lines["slow ranks"] == (
        "none; rank 1 (n1) takes 1.50 x the median, at step 120"
    )
    said = [{"time": NOW - n, "step": 7, "line": f"step 7 takes {n} s"} for n in (900, 60)]
    write(run, "watchdog.jsonl", said)
    assert status_of(run, NOW).errors == ["watchdog, 0:01:00 ago: step 7 takes 60 s"]


def test_a_finished_run_and_a_damaged_one(run: Path) -> None:
    write(run, "metrics.jsonl", [step(130, NOW - 50_000)])
    assert status_of(run, NOW).lines["state"] == "not running: trained to the last step"
    write_beats(run, make_beats({"step": 130, "phase": "validation"}))
    found = status_of(run, NOW)
    assert found.lines["state"].startswith("alive: ")
    assert found.lines["ranks"] == "1 of 1 validating after step 130, for 0:00:10"
    write_beats(run, make_beats({"step": 130, "phase": "end", "ended": True}))
    assert status_of(run, NOW).lines["state"] == "not running: trained to the last step"
    (save(run, 130) / "rank-00000.safetensors").unlink()
    assert "none of the checkpoints is complete" in status_of(run, NOW).lines["checkpoint"]


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run)]) == 0
    told = capsys.readouterr().out
    assert "  step        10 of 130\n" in told and "not running" in told
    with pytest.raises(UserError, match="not a run folder"):
        status_of(run / "nowhere")
    assert main(["status", str(run / "nowhere")]) == 2
