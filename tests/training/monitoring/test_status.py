"""The status of a run, read from the files of its folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hg_scale.atomic_write import write_json
from hg_scale.commands.main import main
from hg_scale.errors import UserError
from hg_scale.training.failures import write_end
from hg_scale.training.monitoring import status
from hg_scale.training.monitoring.heartbeat import file_system_time, pid_namespace
from hg_scale.training.monitoring.run_end import write_run_end
from hg_scale.training.monitoring.status import read_status
from tests.training.monitoring.heartbeats import NOW, make_beats, write_beats
from tests.training.test_check import save


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "queue_state", lambda job: None)


def write(run: Path, name: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / name).write_text(text + '{"incomplete li')


def step(number: int, time: float) -> dict[str, Any]:
    return {
        "step": number, "loss": 2.5, "bits_per_byte": 3.6067, "tokens_per_second": 31_200.0,
        "mfu": 0.415, "step_seconds": 30.0, "time": time, "skipped_steps": 2,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """At step 10 of 130, 30 s a step, the last one 20 s ago."""
    (tmp_path / "config.json").write_text(json.dumps({"training": {"steps": 130}}))
    validation = {"step": 8, "validation_loss": 2.0, "validation_bits_per_byte": 2.8854}
    steps = [step(n, NOW - 20 - 30 * (10 - n)) for n in range(1, 11)]
    write(tmp_path, "metrics.jsonl", [*steps[:8], validation, *steps[8:]])
    return tmp_path


def test_a_running_run(run: Path) -> None:
    save(run, 10)
    found = read_status(run, NOW)
    assert found.alive is True
    assert found.lines["state"] == "alive: last line 0:00:20 ago"
    assert found.lines["step"] == "10 of 130"
    assert found.lines["loss"] == "2.5000, 3.6067 bits per byte"
    assert found.lines["speed"] == "31.2k tokens/s, MFU 41.5%"
    assert found.lines["time left"] == "1:00:00"
    assert found.lines["validation"] == "2.8854 bits per byte at step 8"
    assert found.lines["checkpoint"].startswith("step-00000010, ")
    assert found.lines["skipped"] == "2 bad steps"


def test_a_run_is_dead_after_ten_steps_or_ten_minutes_without_a_line(run: Path) -> None:
    assert read_status(run, NOW + 500).alive is True
    found = read_status(run, NOW + 700)
    assert found.alive is False and "0:12:00 ago, which is too long" in found.lines["state"]
    write(run, "metrics.jsonl", [step(n, NOW - 300 * (10 - n)) for n in range(1, 11)])
    assert read_status(run, NOW + 2900).alive is True
    assert read_status(run, NOW + 3100).alive is False


def test_jobs_restarts_and_last_errors(run: Path) -> None:
    log = run / "hg-train-7.log"
    log.write_text("step 9/130  loss 2.5\nCUDA error: an illegal access\nexit code 76: lost\n")
    first = {"event": "start", "job": "7", "start": 1, "log": str(log), "time": NOW - 900}
    ends = [{**first, "event": "end", "code": code, "requeued": True} for code in (76, 137, 76)]
    starts = [{**first, "start": n} for n in (1, 2, 3, 4)]
    both = [line for pair in zip(starts[:3], ends, strict=True) for line in pair]
    write(run, "jobs.jsonl", both)
    found = read_status(run, NOW)
    assert found.alive is False
    assert found.lines["state"] == (
        "not running: job 7 ended: lost a rank or a node, waiting to start again"
    )
    assert found.errors == ["CUDA error: an illegal access", "exit code 76: lost"]
    write(run, "jobs.jsonl", [*both, {**starts[3], "ends": NOW + 7200}])
    found = read_status(run, NOW)
    assert found.lines["job ends"] == "in 2:00:00"
    assert found.alive is True
    assert found.lines["restarts"] == (
        "3 (2 x lost a rank or a node, 1 x lost a rank or a node (signal 9))"
    )
    assert read_status(run, NOW, last_errors=1).errors == ["exit code 76: lost"]


def test_the_state_in_slurm_overrides_silence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run, "jobs.jsonl", [{"event": "start", "job": "7", "start": 1, "log": "", "time": NOW}])
    for state, alive in (("RUNNING", True), ("PENDING", False)):
        monkeypatch.setattr(status, "queue_state", lambda job, state=state: state)
        found = read_status(run, NOW + 10_000)
        assert (found.alive, found.lines["state"].split(": ")[1]) == (alive, f"job 7 is {state}")


def test_a_job_that_slurm_itself_requeued_is_waiting(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {"event": "end", "job": "7", "start": 1, "log": "", "time": NOW, "requeued": False}
    write(run, "jobs.jsonl", [{**ended, "code": 76}])
    for state, suffix in (("PENDING", ", waiting to start again"), ("COMPLETING", ""), (None, "")):
        monkeypatch.setattr(status, "queue_state", lambda job, state=state: state)
        found = read_status(run, NOW)
        assert found.lines["state"] == f"not running: job 7 ended: lost a rank or a node{suffix}"


def test_squeue_is_called_with_one_element_of_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job id of the last element is also that of the whole array."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\ncase $3 in --jobs=7_2) echo RUNNING ;; --jobs=7) echo RUNNING; echo PENDING ;; "
        "esac\n"
    )
    squeue.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write(tmp_path, "jobs.jsonl", [{"event": "start", "job": "7_2", "log": "", "time": NOW}])
    found = read_status(tmp_path, NOW)
    assert (found.alive, found.lines["state"]) == (True, "alive: job 7_2 is RUNNING")


def test_heartbeats_override_the_last_line(run: Path) -> None:
    write_beats(run, make_beats({"step": 11}, {"step": 11}))
    found = read_status(run, NOW)
    assert found.lines["state"] == "alive: last heartbeat 0:00:02 ago"
    assert found.lines["ranks"] == "2 of 2 in step 11, for 0:00:10"
    found = read_status(run, NOW + 5000)
    assert found.alive is False and "ranks" not in found.lines
    assert found.lines["state"].endswith("last heartbeat 1:23:22 ago, which is too long")

    stuck = {"since": NOW - 300, "step_seconds": 30.0}
    data = {**stuck, "work": "data", "turns": 1}
    write_beats(run, make_beats(stuck, data, stuck))
    assert read_status(run, NOW).lines["ranks"] == (
        "2 of 3 in step 120, 1 of 3 reading data for step 120, for 0:05:00; "
        "rank 1 (n1) is still reading data"
    )
    write_beats(run, make_beats({}, {}, {"time": NOW - 100}))
    assert (
        read_status(run, NOW).lines["ranks"].endswith("rank 2 (n2) has sent no heartbeat for 100 s")
    )
    write_beats(run, make_beats(*[{"ended": True}] * 3))
    assert read_status(run, NOW).lines["state"] == "not running: all ranks ended, 0:00:02 ago"


def test_killed_processes_are_noticed_at_once(run: Path) -> None:
    """In the same PID namespace; on another host or in a container, only after STALE seconds."""
    with subprocess.Popen(["true"]) as process:
        pass
    killed = {"pid": process.pid, "pid_space": pid_namespace()}
    write_beats(run, make_beats(killed, killed))
    found = read_status(run, NOW)
    assert found.alive is False
    assert found.lines["state"] == (
        "not running: rank 0 (n0), rank 1 (n1) died without reporting an error, last heartbeat "
        "0:00:02 ago"
    )
    write_beats(run, make_beats(*[{**killed, "hung": True}] * 2))
    assert "rank 1 (n1) ended by the watchdog, " in read_status(run, NOW).lines["state"]
    write_beats(run, make_beats(killed, {**killed, "pid_space": "elsewhere"}))
    assert read_status(run, NOW).alive is True
    write_beats(run, make_beats(killed, {**killed, "pid": os.getpid()}))
    assert read_status(run, NOW).alive is True
    write_beats(run, make_beats(*[{**killed, "ended": True}] * 2))
    assert read_status(run, NOW).lines["state"].startswith("not running: all ranks ended, ")


def test_errors_of_ranks_are_shown(run: Path) -> None:
    write_beats(run, make_beats(*[{"ended": True}] * 2))
    write_end(run, 1, 77, "gave up after step 9")
    write_end(run, 2, 1, "of an earlier start with more ranks")
    assert read_status(run, NOW).errors == ["rank 1 ended with exit code 77: gave up after step 9"]
    write_beats(run, make_beats({}, {}))
    assert read_status(run, NOW).errors == []


def test_a_starting_run(tmp_path: Path) -> None:
    write_beats(tmp_path, make_beats(*[{"step": 0, "phase": "start"}] * 2))
    found = read_status(tmp_path, NOW)
    assert found.alive is True and found.lines["ranks"] == "2 of 2 starting, for 0:00:10"


def test_a_refused_job_does_not_hide_a_running_one(run: Path) -> None:
    end = {"job": 8, "start": 1, "event": "end", "log": "", "code": 1, "requeued": False}
    write_beats(run, make_beats({}, {}))
    for ago, alive in ((60, True), (1, False)):
        write(run, "jobs.jsonl", [{**end, "time": NOW - ago}])
        assert read_status(run, NOW).alive is alive


def test_slow_ranks_and_the_report_of_the_watchdog(run: Path) -> None:
    write_beats(run, make_beats({}, {}))
    assert "slow ranks" not in read_status(run, NOW).lines
    row = {"rank": 0, "data_seconds": 0.0, "forward_seconds": 0.25, "ratio": 1.0}
    slow = {"rank": 1, "data_seconds": 0.125, "forward_seconds": 0.25, "ratio": 1.5}
    table = {"step": 120, "threshold": 1.3, "ranks": [row, slow]}
    write_json(run / "ranks" / "stragglers.json", table)
    assert read_status(run, NOW).lines["slow ranks"] == (
        "rank 1 (n1) 1.50 x the median (data 0.125 s, forward 0.25 s per step), at step 120"
    )
    write_json(run / "ranks" / "stragglers.json", {**table, "threshold": 2.0})
    assert read_status(run, NOW).lines["slow ranks"] == (
        "none; rank 1 (n1) takes 1.50 x the median, at step 120"
    )
    reports = [{"time": NOW - n, "step": 7, "line": f"step 7 takes {n} s"} for n in (900, 60)]
    write(run, "watchdog.jsonl", reports)
    assert read_status(run, NOW).errors == ["watchdog, 0:01:00 ago: step 7 takes 60 s"]


def test_a_finished_run_and_a_corrupt_checkpoint(run: Path) -> None:
    write(run, "metrics.jsonl", [step(130, NOW - 50_000)])
    assert read_status(run, NOW).lines["state"] == "not running: trained to the last step"
    write_beats(run, make_beats({"step": 130, "phase": "validation"}))
    found = read_status(run, NOW)
    assert found.lines["state"].startswith("alive: ")
    assert found.lines["ranks"] == "1 of 1 validating after step 130, for 0:00:10"
    write_beats(run, make_beats({"step": 130, "phase": "end", "ended": True}))
    assert read_status(run, NOW).lines["state"] == "not running: trained to the last step"
    (save(run, 130) / "rank-00000.safetensors").unlink()
    assert "none of the checkpoints is complete" in read_status(run, NOW).lines["checkpoint"]


def test_the_command_prints_the_status(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run)]) == 0
    output = capsys.readouterr().out
    assert "  step        10 of 130\n" in output and "not running" in output
    with pytest.raises(UserError, match="not a run folder"):
        read_status(run / "nowhere")
    assert main(["status", str(run / "nowhere")]) == 2


def test_ages_are_those_of_the_file_system_and_never_negative(run: Path) -> None:
    """Rank 1's host is a day ahead, rank 2's five minutes behind; the checkpoint is of tomorrow."""
    write(run, "metrics.jsonl", [step(10, time.time() + 86_400)])
    now = file_system_time(run)
    times = (now - 20, now + 86_400 - 20, now - 300 - 20)
    write_beats(run, make_beats(*[{"time": t, "since": t - 10} for t in times]))
    for rank in range(3):
        os.utime(run / "ranks" / f"rank-{rank:05}.json", (now - 20, now - 20))
    os.utime(save(run, 10) / "manifest.json", (now + 86_400, now + 86_400))
    found = read_status(run)
    assert re.fullmatch(
        r"alive: by file times \(the clock of rank 1 \(n1\) is 1d 00:00 ahead, "
        r"rank 2 \(n2\) is 0:05:00 behind\): last heartbeat 0:00:2\d ago", found.lines["state"]
    ), found.lines["state"]  # fmt: skip
    assert re.fullmatch("3 of 3 in step 120, for 0:00:3.", found.lines["ranks"])
    checkpoint = re.fullmatch("step-00000010, its file is dated (.*) ahead of now",
                              found.lines["checkpoint"])  # fmt: skip
    assert checkpoint and checkpoint[1] in ("1d 00:00", "23:59:59")
    for rank in range(3):  # the clocks of the records still say otherwise
        os.utime(run / "ranks" / f"rank-{rank:05}.json", (now - 90, now - 90))
    assert read_status(run).alive is False
    assert not list(run.glob(".clock-*"))
    assert read_status(run, NOW + 10).alive is not None  # without heartbeats of that time


def test_a_cancelled_job_is_not_to_be_started_again(run: Path) -> None:
    end = {"event": "end", "job": "7", "start": 1, "log": "", "time": NOW, "requeued": False}
    start = {**end, "event": "start"}
    for more, state in (
        ({"code": 75}, "job 7 ended: saved, not requeued"),
        ({"code": 75, "state": "CANCELLED"}, "job 7 was cancelled, saved"),
        ({"code": 143, "state": "CANCELLED"}, "job 7 was cancelled"),
        (
            {"code": 75, "requeued": True},
            "job 7 ended: saved, to be started again, waiting to start again",
        ),
    ):
        write(run, "jobs.jsonl", [start, {**end, **more}])
        found = read_status(run, NOW)
        assert found.lines["state"] == f"not running: {state}"
        assert found.lines["restarts"] == "0"


def test_a_refused_job_changes_nothing_of_the_status(run: Path) -> None:
    """Known by what the running job does later: a heartbeat, or another record."""

    def record(job: str, event: str, ago: float, **more: Any) -> dict[str, Any]:
        log = run / f"{job}.log"
        log.write_text(f"error of job {job}\n")
        base = {"job": job, "start": 1, "event": event, "time": NOW - ago, "log": str(log)}
        return {**base, **more}

    first = record("1", "start", 100, ends=NOW + 60)
    refused = [record("2", "start", 60), record("2", "end", 40, code=1, requeued=False)]
    write(run, "jobs.jsonl", [first, *refused])
    write_beats(run, make_beats({}, {}))
    found = read_status(run, NOW)
    assert found.lines["restarts"] == "0" and found.errors == ["error of job 1"]
    assert found.lines["job ends"] == "in 0:01:00" and found.alive is True
    ended = record("1", "end", 1, code=0, requeued=False)
    write(run, "jobs.jsonl", [first, *refused, ended])
    write_beats(run, make_beats(*[{"ended": True}] * 2))
    found = read_status(run, NOW)
    assert found.lines["state"] == "not running: job 1 ended: done"
    assert found.lines["restarts"] == "0" and found.errors == ["error of job 1"]
    # A job that has died without a record is no longer running: the second one is its restart.
    write(run, "jobs.jsonl", [first, *refused])
    write_beats(run, make_beats(*[{"time": NOW - 42}] * 2))
    found = read_status(run, NOW)
    assert found.lines["restarts"] == "1" and found.errors == ["error of job 2"]
    assert found.lines["state"].startswith("not running: job 2 ended: failed")


def test_the_end_of_a_run_outside_of_slurm(run: Path) -> None:
    write_beats(run, make_beats(*[{"ended": True}] * 2))
    write_run_end(run, 75, "signal TERM: saved at step 10")
    now = (run / "end.json").stat().st_mtime
    found = read_status(run, now + 60)
    assert found.lines["state"] == "not running: signal TERM: saved at step 10, 0:01:00 ago"
    (run / "end.json").write_text("[")
    assert read_status(run, NOW).lines["state"] == "not running: all ranks ended, 0:00:02 ago"
