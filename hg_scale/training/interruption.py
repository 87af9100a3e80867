"""Ending before the last step, on all ranks alike: a signal came, or the job's time is over.

Under Slurm a job is told before its time limit and before it is preempted; `slurm/common.sh` also
says when the job ends, for the case that nobody does.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

from hg_scale.training.stop_signals import StopSignals, in_words

_RECENT = 20  # steps whose slowest says how long the next one may take
_OUT_OF_TIME = 1000  # above the numbers of signals, which it outranks


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
        if dist.get_world_size() > 1:
            flag = torch.tensor(reason, device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reason = int(flag)
        return _in_words(reason)

    def _own(self, ahead: float) -> int:
        """This rank's reason to end as a number; 0: none."""
        if self._ends is not None:
            needed = max(self._recent, default=0.0) + ahead + self._margin
            if self._clock() + needed > self._ends:
                return _OUT_OF_TIME
        return int(self.signals.received)


def _in_words(reason: int) -> str | None:
    """The reason that all ranks have agreed on."""
    if reason == _OUT_OF_TIME:
        return "the time limit is near"
    return in_words(reason) if reason else None


def end_of_job() -> float | None:
    """When Slurm ends the job, in seconds since 1970, as `slurm/common.sh` has found out."""
    told = os.environ.get("HG_END_TIME", "")
    return float(told) if told.isdecimal() else None
