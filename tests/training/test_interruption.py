"""Runs that are asked to end: by a signal on one rank, or since their time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hg_scale.exit_codes import DONE, REQUEUE
from hg_scale.training import interruption
from hg_scale.training.interruption import Interruption, StopSignals, end_of_job
from tests.ports import free_port
from tests.runs import curve, records, run_train, train_in
from tests.shared import ROOT
from tests.world import Worlds

Words = list[str]


def words(config: Path, run: Path, *sets: str) -> Words:
    overrides = [word for key in sets for word in ("--set", key)]
    return ["--config", str(config), "--run", str(run), *overrides]


def signalled(arguments: Words, output: Path, at: int, number: int) -> int:
    """Train; the last rank gets a signal in the step `at`, or before the start at 0."""
    from hg_scale.training import loop, run

    def note(*_: object) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)

    class Timer(loop.StepTimer):
        steps = 0

        def count_step(self, tokens: int) -> None:
            super().count_step(tokens)
            self.steps += 1
            if self.steps == at:
                note()

    make_mesh = run.make_mesh
    early = mock.Mock(side_effect=lambda *a: (at == 0 and note(), make_mesh(*a))[1])
    with mock.patch.object(loop, "StepTimer", Timer), mock.patch.object(run, "make_mesh", early):
        return run_train(arguments, output)


@pytest.mark.parametrize(("size", "kind"), [(1, "false"), (2, "true")])
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_one_rank_saves_and_ends_all(
    worlds: Worlds, config: Path, tmp_path: Path, size: int, kind: str, name: str
) -> None:
    """After that very step, with no validation; the run goes on bit for bit."""
    sets = (f"checkpoint.async={kind}", "training.validate_every=3", "logging.every=2")
    output, number = tmp_path / "told", getattr(signal, f"SIG{name}")
    run = tmp_path / "run"
    codes = worlds.run(size, signalled, words(config, run, *sets), output, 3, number)
    assert codes == [REQUEUE] * size
    told = "".join(path.read_text() for path in tmp_path.glob("told-*"))
    assert f"signal {name}: saved at step 3, to be started again" in told
    assert "validation" not in told and "Traceback" not in told
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert [r["step"] for r in records(run)] == [1, 2, 3]  # the last one is logged

    done = train_in(worlds, size, tmp_path, *words(config, run, *sets))
    assert done.code == DONE and "resumed at step 3" in done.output, done.output
    whole = train_in(worlds, size, tmp_path, *words(config, tmp_path / "whole", *sets))
    assert whole.code == DONE
    assert [point for point in curve(run) if point[0] != 3] == curve(tmp_path / "whole")


def signalled_in_validation(arguments: Words, output: Path, of: int) -> tuple[int, int]:
    """Train; the last rank gets a signal in its `of`-th stretch of validation. And: stretches."""
    from hg_scale.training import loop

    stretches = 0

    def stretch(batches: Any, number: int) -> Any:
        nonlocal stretches
        stretches += 1
        if stretches == of and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return islice(batches, number)

    with mock.patch.object(loop, "STRETCH", 2), mock.patch.object(loop, "islice", stretch):
        return run_train(arguments, output), stretches


def test_a_signal_in_a_validation_ends_it(worlds: Worlds, config: Path, tmp_path: Path) -> None:
    """Saved if it was not before. But the last validation goes on: none would make up for it."""
    sets = ("training.validate_every=2", "checkpoint.every=4", "parallel.pipeline=2")
    output, run = tmp_path / "told", tmp_path / "run"
    for step, code, stretches in ((2, REQUEUE, 2), (4, REQUEUE, 2), (6, DONE, 4)):
        done = worlds.run(2, signalled_in_validation, words(config, run, *sets), output, 2)
        assert done == [(code, stretches)] * 2
        assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08}\n"
        told = output.with_name("told-0").read_text()
        assert (f"signal TERM: saved at step {step}, to be" in told) == (step < 6)
    one = (*sets[:2], "parallel.pipeline=1")  # process, and a validation in one stretch
    assert train_in(worlds, 1, tmp_path, *words(config, tmp_path / "one", *one)).code == DONE
    np.testing.assert_allclose(curve(run), curve(tmp_path / "one"), rtol=1e-4)
    found, expected = (records(folder)[-1]["validation_loss"] for folder in (run, tmp_path / "one"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("at", "code"), [(0, REQUEUE), (6, DONE)])
def test_a_signal_in_the_start_and_in_the_last_step(
    worlds: Worlds, config: Path, tmp_path: Path, at: int, code: int
) -> None:
    output = tmp_path / "told"
    arguments = words(config, tmp_path / "run")
    assert worlds.run(2, signalled, arguments, output, at, signal.SIGUSR2) == [code] * 2
    told = output.with_name("told-0").read_text()
    if at == 0:
        assert "signal USR2: before the first step, to be started again" in told
        assert not (tmp_path / "run" / "checkpoints").exists()
    else:
        assert "step 6 of 6 saved" in told and "again" not in told


def test_a_signal_that_is_not_among_those_configured(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """It is whatever the site makes of it."""
    arguments = words(config, tmp_path / "run", 'training.stop_signals=["TERM"]')
    code, heard = worlds.run(1, with_own_handler, arguments, tmp_path / "told")[0]
    assert (code, heard) == (DONE, [signal.SIGUSR1])


def with_own_handler(arguments: Words, output: Path) -> tuple[int, list[int]]:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        return signalled(arguments, output, 3, signal.SIGUSR1), heard
    finally:
        signal.signal(signal.SIGUSR1, before)


def out_of_time(arguments: Words, output: Path) -> int:
    """Only the first rank knows when the job ends: in a second."""
    if dist.get_rank() == 0:
        os.environ["HG_END_TIME"] = str(int(time.time()) + 1)
    try:
        return run_train(arguments, output)
    finally:
        os.environ.pop("HG_END_TIME", None)


def test_the_time_limit(worlds: Worlds, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "told"
    run = tmp_path / "run"
    assert train_in(worlds, 2, tmp_path, *words(config, run), "--stop-at", "2").code == DONE
    assert worlds.run(2, out_of_time, words(config, run), output) == [REQUEUE] * 2
    told = output.with_name("told-0").read_text()
    assert "the time limit is near: saved at step 2, to be started again" in told


def asked(times: list[float], **more: float) -> list[bool]:
    """Whether a run whose job ends at 1000 ends at each of these, after steps of 5 s or less."""
    now = iter(times)
    one = Interruption(StopSignals(), 10.0, 1000.0, clock=lambda: next(now))
    device = torch.device("cpu")
    seconds = [1.0, 5.0, *[2.0] * len(times)]
    return [one.agreed(i, device, seconds[i], **more) is not None for i in range(len(times))]


def ask(times: list[float], more: dict[str, float]) -> list[bool]:
    return asked(times, **more)


def test_what_the_time_left_has_to_cover(worlds: Worlds) -> None:
    """The slowest recent step, what is ahead, and the margin."""
    (ends,) = worlds.run(1, ask, [988, 984.9, 985.1, 984.9], {})
    assert ends == [False, False, True, False]
    (ends,) = worlds.run(1, ask, [958, 954.9, 955.1], {"ahead": 30.0})
    assert ends == [False, False, True]
    (ends,) = worlds.run(1, ask, [0.0] + [980.0] * 24, {})
    assert not any(ends)
    (ends,) = worlds.run(1, ask, [0.0, 0.0] + [987.0] * 24, {})
    assert ends == [False, False] + [True] * 19 + [False] * 5  # 20 steps later it is forgotten


@pytest.mark.parametrize(("told", "end"), [("", None), ("Unknown", None), ("1700", 1700.0)])
def test_when_the_job_ends(monkeypatch: pytest.MonkeyPatch, told: str, end: float | None) -> None:
    monkeypatch.setenv("HG_END_TIME", told)
    assert end_of_job() == end


EARLY = """
import os, signal, sys
from pathlib import Path
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":  # the long start begins
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
import runpy
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("hg_scale/train.py", run_name="__main__")
"""


def test_a_signal_before_torch_is_there(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, *words(config, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == REQUEUE, done.stdout + done.stderr
    assert "signal TERM: before the first step, to be started again" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_the_others_do_not_come(config: Path, tmp_path: Path, rank: int) -> None:
    """The process waits for them in C++, where no handler of Python's runs."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "hg_scale" / "train.py"), *words(config, run)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, **place},
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run / "logs").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        time.sleep(2.0)  # by now it waits
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == REQUEUE
    assert told == (
        f"rank {rank}: signal TERM while waiting for the other processes, before the first step; "
        "to be started again\n"
    )


@pytest.mark.parametrize(("before", "others"), [(False, 0.1), (True, 0.1), (False, 30), (True, 30)])
def test_ranks_that_still_meet_end_together(
    monkeypatch: pytest.MonkeyPatch, before: bool, others: float
) -> None:
    """A signal then is one like any other, noted; it may have come before the wait began."""
    monkeypatch.setattr(interruption, "_OTHERS_COME", others)
    ended: list[str] = []
    with StopSignals(["USR1"]) as signals:
        if before:
            signal.raise_signal(signal.SIGUSR1)
        with signals.ending_a_wait(ended.append):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(1.0)
        assert signals.received == signal.SIGUSR1
    assert set(ended) == ({"signal USR1"} if others < 1 else set())
    assert signal.set_wakeup_fd(-1) == -1
