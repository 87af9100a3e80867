"""Runs that stop early: on a signal to one rank, or near the time limit."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
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
from tests.runs import arguments, curve, records, run_train, train_in
from tests.shared import ROOT
from tests.world import Worlds


def train_with_signal(command_line: list[str], output: Path, step: int, number: int) -> int:
    """Train; the last rank gets signal `number` in step `step`, or during start-up if it is 0."""
    from hg_scale.training import loop, run

    def send(*_: object) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)

    class Timer(loop.StepTimer):
        steps = 0

        def count_step(self, tokens: int) -> None:
            super().count_step(tokens)
            self.steps += 1
            if self.steps == step:
                send()

    make_mesh = run.make_mesh
    early = mock.Mock(side_effect=lambda *a: (step == 0 and send(), make_mesh(*a))[1])
    with mock.patch.object(loop, "StepTimer", Timer), mock.patch.object(run, "make_mesh", early):
        return run_train(command_line, output)


@pytest.mark.parametrize(("size", "kind"), [(1, "false"), (2, "true")])
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_one_rank_saves_and_ends_all(
    worlds: Worlds, config: Path, tmp_path: Path, size: int, kind: str, name: str
) -> None:
    """After the current step, without validating; resuming gives the same curve bit for bit."""
    sets = (f"checkpoint.async={kind}", "training.validate_every=3", "logging.every=2")
    output, number = tmp_path / "stopped", getattr(signal, f"SIG{name}")
    run = tmp_path / "run"
    codes = worlds.run(size, train_with_signal, arguments(config, run, *sets), output, 3, number)
    assert codes == [REQUEUE] * size
    text = "".join(path.read_text() for path in tmp_path.glob("stopped-*"))
    assert f"signal {name}: saved at step 3, to be started again" in text
    assert "validation" not in text and "Traceback" not in text
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert [r["step"] for r in records(run)] == [1, 2, 3]  # step 3 is logged since it is the last

    done = train_in(worlds, size, tmp_path, *arguments(config, run, *sets))
    assert done.code == DONE and "resumed at step 3" in done.output, done.output
    reference = tmp_path / "uninterrupted"
    done = train_in(worlds, size, tmp_path, *arguments(config, reference, *sets))
    assert done.code == DONE
    assert [point for point in curve(run) if point[0] != 3] == curve(reference)


def train_with_signal_in_validation(
    command_line: list[str], output: Path, part: int
) -> tuple[int, int]:
    """Train; the last rank gets a signal in part `part` of its validation. Counts parts, too."""
    from hg_scale.training import loop

    parts = 0

    def signal_and_slice(batches: Any, number: int) -> Any:
        nonlocal parts
        parts += 1
        if parts == part and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return islice(batches, number)

    with (
        mock.patch.object(loop, "BATCHES_PER_CHECK", 2),
        mock.patch.object(loop, "islice", signal_and_slice),
    ):
        return run_train(command_line, output), parts


def test_a_signal_ends_a_validation_unless_it_is_the_last(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """The step is saved if it was not before."""
    sets = ("training.validate_every=2", "checkpoint.every=4", "parallel.pipeline=2")
    output, run = tmp_path / "stopped", tmp_path / "run"
    job = train_with_signal_in_validation
    for step, code, parts in ((2, REQUEUE, 2), (4, REQUEUE, 2), (6, DONE, 4)):
        done = worlds.run(2, job, arguments(config, run, *sets), output, 2)
        assert done == [(code, parts)] * 2
        assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08}\n"
        text = output.with_name("stopped-0").read_text()
        assert (f"signal TERM: saved at step {step}, to be" in text) == (step < 6)
    # The reference: one process, a validation in one part.
    reference = tmp_path / "reference"
    one = (*sets[:2], "parallel.pipeline=1")
    assert train_in(worlds, 1, tmp_path, *arguments(config, reference, *one)).code == DONE
    np.testing.assert_allclose(curve(run), curve(reference), rtol=1e-4)
    found, expected = (records(folder)[-1]["validation_loss"] for folder in (run, reference))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("step", "code"), [(0, REQUEUE), (6, DONE)])
def test_a_signal_during_start_up_and_in_the_last_step(
    worlds: Worlds, config: Path, tmp_path: Path, step: int, code: int
) -> None:
    output = tmp_path / "stopped"
    command_line = arguments(config, tmp_path / "run")
    codes = worlds.run(2, train_with_signal, command_line, output, step, signal.SIGUSR2)
    assert codes == [code] * 2
    text = output.with_name("stopped-0").read_text()
    if step == 0:
        assert "signal USR2: before the first step, to be started again" in text
        assert not (tmp_path / "run" / "checkpoints").exists()
    else:
        assert "step 6 of 6 saved" in text and "again" not in text


def test_a_signal_that_is_not_configured_keeps_its_handler(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    command_line = arguments(config, tmp_path / "run", 'training.stop_signals=["TERM"]')
    ((code, handled),) = worlds.run(1, train_with_handler, command_line, tmp_path / "stopped")
    assert (code, handled) == (DONE, [signal.SIGUSR1])


def train_with_handler(command_line: list[str], output: Path) -> tuple[int, list[int]]:
    """Train with a handler of the site for USR1; the exit code and what the handler got."""
    handled: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        return train_with_signal(command_line, output, 3, signal.SIGUSR1), handled
    finally:
        signal.signal(signal.SIGUSR1, previous)


def train_out_of_time(command_line: list[str], output: Path) -> int:
    """Train; the job ends in a second, which only rank 0 knows."""
    if dist.get_rank() == 0:
        os.environ["HG_END_TIME"] = str(int(time.time()) + 1)
    try:
        return run_train(command_line, output)
    finally:
        os.environ.pop("HG_END_TIME", None)


def test_a_run_near_the_time_limit_saves_and_stops(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    output, command_line = tmp_path / "stopped", arguments(config, tmp_path / "run")
    assert train_in(worlds, 2, tmp_path, *command_line, "--stop-at", "2").code == DONE
    assert worlds.run(2, train_out_of_time, command_line, output) == [REQUEUE] * 2
    text = output.with_name("stopped-0").read_text()
    assert "the time limit is near: saved at step 2, to be started again" in text


def stops_at(times: list[float], ahead: float) -> list[bool]:
    """Whether a run whose job ends at 1000 stops at each of `times`, after steps of 5 s or less."""
    now = iter(times)
    interruption = Interruption(StopSignals(), 10.0, 1000.0, clock=lambda: next(now))
    device = torch.device("cpu")
    seconds = [1.0, 5.0, *[2.0] * len(times)]
    return [
        interruption.stop_reason(step, device, seconds[step], ahead) is not None
        for step in range(len(times))
    ]


def test_the_time_left_covers_slowest_step_save_and_margin(worlds: Worlds) -> None:
    (stops,) = worlds.run(1, stops_at, [988, 984.9, 985.1, 984.9], 0.0)
    assert stops == [False, False, True, False]
    (stops,) = worlds.run(1, stops_at, [958, 954.9, 955.1], 30.0)
    assert stops == [False, False, True]
    (stops,) = worlds.run(1, stops_at, [0.0] + [980.0] * 24, 0.0)
    assert not any(stops)
    (stops,) = worlds.run(1, stops_at, [0.0, 0.0] + [987.0] * 24, 0.0)
    assert stops == [False, False] + [True] * 19 + [False] * 5  # the slow step is 20 steps ago


@pytest.mark.parametrize(("value", "end"), [("", None), ("Unknown", None), ("1700", 1700.0)])
def test_end_of_the_job_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, end: float | None
) -> None:
    monkeypatch.setenv("HG_END_TIME", value)
    assert end_of_job() == end


EARLY = """
import os, signal, sys
from pathlib import Path
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":  # in the first seconds of start-up
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
import runpy
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("hg_scale/train.py", run_name="__main__")
"""


def test_a_signal_before_torch_is_imported(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, *arguments(config, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == REQUEUE, done.stdout + done.stderr
    assert "signal TERM: before the first step, to be started again" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_waiting_for_the_other_ranks(
    config: Path, tmp_path: Path, rank: int
) -> None:
    """The process waits in C++, where Python runs no signal handler."""
    launch = {"RANK": str(rank), "WORLD_SIZE": "2"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "hg_scale" / "train.py"), *arguments(config, run)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, **launch},
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run / "logs").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        time.sleep(2.0)  # until the process waits
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == REQUEUE
    assert text == (
        f"rank {rank}: signal TERM while waiting for the other processes, before the first step; "
        "to be started again\n"
    )


@pytest.mark.parametrize(("before", "grace"), [(False, 0.1), (True, 0.1), (False, 30), (True, 30)])
def test_a_wait_that_succeeds_in_the_grace_time_goes_on(
    monkeypatch: pytest.MonkeyPatch, before: bool, grace: float
) -> None:
    """The signal is recorded then; it may also have arrived `before` the wait."""
    monkeypatch.setattr(interruption, "_RENDEZVOUS_GRACE", grace)
    ended: list[str] = []
    with StopSignals(["USR1"]) as signals:
        if before:
            signal.raise_signal(signal.SIGUSR1)
        with signals.end_wait_on_signal(ended.append):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(1.0)
        assert signals.received == signal.SIGUSR1
    assert set(ended) == ({"signal USR1"} if grace < 1 else set())
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Handle SIGINT, which is ignored where the tests run in the background of a script."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("default_interrupt")
def test_a_second_interrupt_ends_at_once() -> None:
    """From a thread, as the main thread may wait in C++; the first one while nothing is saved."""
    ended = threading.Event()
    said: list[str] = []
    with StopSignals(["USR1"]) as signals:
        signals.on_interrupt, signals.end_now = lambda: said.append("again"), ended.set
        signals.saves = True
        signal.raise_signal(signal.SIGINT)
        assert str(signals) == "signal INT" and said == ["again"]
        assert not ended.wait(0.1)
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(10) and said == ["again"]
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_signals_that_nohup_ignores_stay_ignored() -> None:
    previous = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGTERM)}
    try:
        with StopSignals(["HUP", "TERM"]) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received
            signal.raise_signal(signal.SIGTERM)
            assert str(signals) == "signal TERM"
            signals.ignore()
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_on_terminal(command_line: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start `train.py` on a terminal of its own; return the process and the terminal's other end.

    Closing that end sends SIGHUP, and writing Ctrl-C to it SIGINT.
    """
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (signal.SIGINT, signal.SIGHUP):  # ignored where tests run in the background
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "hg_scale" / "train.py"), *command_line],
        stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    return process, master


def read_until(terminal: int, text: bytes) -> bytes:
    """Read from a terminal until `text` appears, or the process has closed it."""
    seen = b""
    with suppress(OSError):
        while text not in seen:
            seen += os.read(terminal, 65536)
    return seen


@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("hangup", marks=pytest.mark.cluster)])
def test_a_run_saves_when_its_terminal_ends_it(config: Path, tmp_path: Path, how: str) -> None:
    """The exit code stays 75 under any number of signals while the process ends."""
    run = tmp_path / "run"
    process, terminal = start_on_terminal(arguments(config, run, "training.steps=1000000"))
    try:
        assert b"3/1000000" in read_until(terminal, b"3/1000000")
        if how == "Ctrl-C":
            os.write(terminal, b"\x03")
            assert b"saved at step" in read_until(terminal, b"to be started again")
        else:
            os.close(terminal)
        while process.poll() is None:
            if (run / "end.json").exists():
                process.send_signal(signal.SIGUSR1)
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            os.close(terminal)
    assert process.returncode == REQUEUE
    end = json.loads((run / "end.json").read_text())
    name = "INT" if how == "Ctrl-C" else "HUP"
    (step,) = re.findall(rf"signal {name}: saved at step (\d+)$", end["line"])
    assert end["code"] == REQUEUE
    assert (run / "checkpoints" / "latest").read_text() == f"step-{int(step):08}\n"
