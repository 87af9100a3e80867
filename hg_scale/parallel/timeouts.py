"""How long a collective operation waits for the other ranks before it fails."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from math import ceil

import torch.distributed as dist
from torch.distributed import distributed_c10d

LONG = timedelta(minutes=30)  # compilation, loading, saving, validating
_SAYING = 30.0  # seconds in which the watchdog has told who is late


class Timeouts:
    """Of all process groups at once: long from the start, short while steps follow each other.

    A rank that another one waits for in vain then costs minutes of the allocation, and a slow disk
    costs no run. Groups in `spared`, such as those that wait for a disk, are left as they are.
    """

    def __init__(self, seconds: float, spared: Collection[dist.ProcessGroup] = ()) -> None:
        """`seconds`: the short one."""
        self._short = timedelta(seconds=min(seconds, LONG.total_seconds()))
        self._spared, self._now = spared, LONG

    def shorten(self, watched: float = 0.0) -> None:
        """A step is done on all ranks, after nothing but another step.

        `watched`: seconds after which the watchdog ends a step. It says who is late, so it goes
        first: the groups then wait that multiple of the short time which is longer. 0: never.
        """
        times = ceil((watched + _SAYING) / self._short.total_seconds()) if watched else 1
        self._set(min(LONG, times * self._short))

    def lengthen(self) -> None:
        """What comes may take its time on some ranks, also while others begin the next step."""
        self._set(LONG)

    def _set(self, timeout: timedelta) -> None:
        if timeout == self._now:
            return
        self._now = timeout
        for group in list(distributed_c10d._world.pg_map):
            if group not in self._spared:
                distributed_c10d._set_pg_timeout(timeout, group)
