"""Stop a run early, on all ranks after the same step: on a signal, or near the time limit.

Slurm signals a job before its time limit and before a preemption; `slurm/common.sh` also exports
when the job ends, for sites that send no signal. Ctrl-C (SIGINT) saves and ends too; a second one
ends the process at once. Imports no torch before the first step, so that the signal handlers are
installed before the long start-up.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from hg_scale.exit_codes import INTERRUPTED

if TYPE_CHECKING:
    import torch

_RENDEZVOUS_GRACE = 5.0  # seconds that the other ranks have to arrive after a signal
_RECENT_STEPS = 20  # the slowest of these estimates the next step's time
_OUT_OF_TIME = 1000  # above all signal numbers: it wins the maximum over the ranks


class StopSignals:
    """Records the first stop signal that arrives. A context manager, for the main thread.

    A signal interrupts nothing: the current step, its collectives and a running save continue.
    Exceptions: Ctrl-C before `saves` is set, when there is nothing to save, and the second Ctrl-C.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """`names` as in `training.stop_signals`: TERM, USR1, ..."""
        self.received = 0  # number of the first signal; 0: none
        self.saves = False  # whether the run reacts to `received` by a save
        self.on_interrupt: Callable[[], object] = lambda: None  # after the first Ctrl-C
        self.end_now: Callable[[], object] = lambda: os._exit(INTERRUPTED)  # after the second
        self._numbers: list[int] = []
        self._previous_handlers: dict[int, Any] = {}
        self._interrupts: _InterruptCounter | None = None
        self._names = names

    def install(self, names: Sequence[str]) -> None:
        """Handle these signals, and Ctrl-C, until `restore` or `ignore`."""
        for name in (*names, "INT"):
            number = getattr(signal, f"SIG{name}")
            # Ignored by nohup, or by a shell for a command in the background.
            if name in ("HUP", "INT") and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._numbers.append(number)
            self._previous_handlers[number] = signal.signal(number, self._record)
        self._interrupts = _InterruptCounter(lambda: self.end_now())

    def restore(self) -> None:
        """Handle signals as before `install`."""
        if self._interrupts:
            self._interrupts.close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Ignore the signals from now on: the process ends, and its exit code is decided.

        Python itself resets handlers while it shuts down, but leaves ignored signals ignored.
        """
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> StopSignals:
        self.install(self._names)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    @contextmanager
    def end_wait_on_signal(self, end: Callable[[str], object]) -> Iterator[None]:
        """Call `end` on a stop signal while the main thread waits in C++ for the other ranks.

        Python runs no signal handler during such a wait. After a signal the other ranks have a few
        seconds to arrive, so that all ranks stop at the same step. If they do not, a thread calls
        `end` with the name of the signal; `end` must not return.
        """
        arrived = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:
            while numbers := os.read(reader, 64):  # empty when `writer` is closed
                for number in numbers:
                    grace = 0.0 if number == signal.SIGINT else _RENDEZVOUS_GRACE
                    if number in self._numbers and not arrived.wait(grace):
                        end(signal_name(number))

        thread = threading.Thread(target=watch, name="stop-signals", daemon=True)
        thread.start()
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            if self.received:  # it arrived before `writer` was the wakeup fd
                os.write(writer, bytes([self.received]))
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            arrived.set()
            os.close(writer)
            thread.join()
            os.close(reader)

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if not self.saves:
                raise KeyboardInterrupt
            if self.received != signal.SIGINT:
                self.on_interrupt()
        self.received = self.received or number

    def __str__(self) -> str:
        return signal_name(self.received)


class _InterruptCounter:
    """Calls `end` on the second Ctrl-C from a thread, since the main thread may wait in C++."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._count, name="interrupts", daemon=True).start()

    def _count(self) -> None:
        count = 0
        while numbers := os.read(self._reader, 64):  # empty when the writer is closed
            count += numbers.count(signal.SIGINT)
            if count > 1:
                self._end()
        os.close(self._reader)

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)


def signal_name(number: int) -> str:
    """Return the name of a signal for messages, as in "signal USR1"."""
    return f"signal {signal.Signals(number).name.removeprefix('SIG')}"


class Interruption:
    """Decides on all ranks whether the run has to stop after the current step."""

    def __init__(
        self,
        signals: StopSignals,
        margin: float = 0.0,
        job_end: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`job_end`: the Unix time at which the job is killed; `margin`: seconds to spare."""
        self.signals = signals
        self.step: int | None = None  # the last finished step; None during start-up
        self._margin, self._job_end, self._clock = margin, job_end, clock
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def stop_reason(
        self, step: int, device: torch.device, seconds: float = 0.0, ahead: float = 0.0
    ) -> str | None:
        """Return why all ranks have to save and stop now, or None to continue. A collective.

        step: the last finished step, which took `seconds`.
        ahead: estimated seconds from the end of the next step until a save after it is complete.
        """
        self.step, self.signals.saves = step, True
        if seconds:
            self._step_seconds.append(seconds)
        reason = self._local_reason(ahead)
        import torch
        import torch.distributed as dist

        if dist.get_world_size() > 1:
            flag = torch.tensor(reason, device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reason = int(flag)
        return _describe_reason(reason)

    def _local_reason(self, ahead: float) -> int:
        """This rank's reason to stop as a number; 0: none."""
        if self._job_end is not None:
            needed = max(self._step_seconds, default=0.0) + ahead + self._margin
            if self._clock() + needed > self._job_end:
                return _OUT_OF_TIME
        return int(self.signals.received)


def _describe_reason(reason: int) -> str | None:
    if reason == _OUT_OF_TIME:
        return "the time limit is near"
    return signal_name(reason) if reason else None


def end_of_job() -> float | None:
    """Return the Unix time at which Slurm kills the job; None if `slurm/common.sh` did not set it.

    It is exported as HG_END_TIME.
    """
    value = os.environ.get("HG_END_TIME", "")
    return float(value) if value.isdecimal() else None
