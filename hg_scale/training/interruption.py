"""Stopping before the last step, on all ranks together: on a signal, or near the time limit.

Slurm signals a job before its time limit and before a preemption; `slurm/common.sh` also exports
when the job ends, for sites that send no signal. Imports no torch before the first step, so that
the handlers are installed before the long start-up and no signal is lost in it.
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

if TYPE_CHECKING:
    import torch

_OTHERS_COME = 5.0  # seconds in which ranks that wait for each other may still meet
_RECENT = 20  # steps whose slowest says how long the next one may take
_OUT_OF_TIME = 1000  # above the numbers of signals, which it outranks


class StopSignals:
    """Notes the first of some signals, as a context manager of the main thread.

    Nothing else happens then: a step under way, its collective operations and its save go on.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """`names` as in `training.stop_signals`: TERM, USR1, ..."""
        self.received = 0  # its number
        self._numbers = [getattr(signal, f"SIG{name}") for name in names]
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def ending_a_wait(self, end: Callable[[str], object]) -> Iterator[None]:
        """While the main thread waits in C++ for the other ranks, where Python runs no handler.

        Once one of the signals has come, the others get a few seconds to come too, so that all end
        together; then `end` is called on a thread, with the signal in words. It is not to return.
        """
        met = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:
            while numbers := os.read(reader, 64):  # empty where the other end is closed
                for number in numbers:
                    if number in self._numbers and not met.wait(_OTHERS_COME):
                        end(signal_name(number))

        watching = threading.Thread(target=watch, name="stop-signals", daemon=True)
        watching.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            if self.received:  # before the next signals went to `writer`
                os.write(writer, bytes([self.received]))
            yield
        finally:
            signal.set_wakeup_fd(before)
            met.set()
            os.close(writer)
            watching.join()
            os.close(reader)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def __str__(self) -> str:
        return signal_name(self.received)


def signal_name(number: int) -> str:
    """A signal as one speaks of it: signal USR1."""
    return f"signal {signal.Signals(number).name.removeprefix('SIG')}"


class Interruption:
    """Whether a run has to end after this step, and how far it has come."""

    def __init__(
        self,
        signals: StopSignals,
        margin: float = 0.0,
        ends: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`ends`: when the job will be ended, in seconds since 1970; `margin`: seconds to spare."""
        self.signals = signals
        self.step: int | None = None  # the last that is finished; None before the first question
        self._margin, self._ends, self._clock = margin, ends, clock
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def agreed(
        self, step: int, device: torch.device, seconds: float = 0.0, ahead: float = 0.0
    ) -> str | None:
        """Why all ranks are to save and end now, or None. A collective operation of all ranks.

        `step` is finished and took `seconds`; `ahead` are those until the end of a save that
        begins when the next one has ended, without that step's own.
        """
        self.step = step
        if seconds:
            self._recent.append(seconds)
        reason = self._own(ahead)
        import torch
        import torch.distributed as dist

        if dist.get_world_size() > 1:
            flag = torch.tensor(reason, device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reason = int(flag)
        return _describe(reason)

    def _own(self, ahead: float) -> int:
        """This rank's reason to end as a number; 0: none."""
        if self._ends is not None:
            needed = max(self._recent, default=0.0) + ahead + self._margin
            if self._clock() + needed > self._ends:
                return _OUT_OF_TIME
        return int(self.signals.received)


def _describe(reason: int) -> str | None:
    """The reason that all ranks have agreed on."""
    if reason == _OUT_OF_TIME:
        return "the time limit is near"
    return signal_name(reason) if reason else None


def end_of_job() -> float | None:
    """When Slurm ends the job, in seconds since 1970, as `slurm/common.sh` has found out."""
    told = os.environ.get("HG_END_TIME", "")
    return float(told) if told.isdecimal() else None
