"""How long a collective waits for the other ranks before it fails."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from math import ceil

import torch.distributed as dist
from torch.distributed import distributed_c10d

LONG = timedelta(minutes=30)  # compilation, loading, saving, validating
_REPORT_SECONDS = 30.0  # in which the watchdog has reported a hang


class Timeouts:
    """Timeout of all process groups: long at the start and in pauses, short between steps.

    A missing rank then costs minutes of the allocation, and a slow disk does not end the run.
    Groups in `excluded`, such as those that wait for a disk, keep their timeout.
    """

    def __init__(self, seconds: float, excluded: Collection[dist.ProcessGroup] = ()) -> None:
        """`seconds`: the short timeout."""
        self._short = timedelta(seconds=min(seconds, LONG.total_seconds()))
        self._excluded, self._current = excluded, LONG

    def shorten(self, step_limit: float = 0.0) -> None:
        """Call it when a step that followed another step has ended on all ranks.

        `step_limit`: seconds after which the watchdog ends a step, 0 if it does not. It reports
        which rank is late, so the timeout is the next multiple of the short one that is longer.
        """
        needed = step_limit + _REPORT_SECONDS if step_limit else 0.0
        times = max(1, ceil(needed / self._short.total_seconds()))
        self._set(min(LONG, times * self._short))

    def lengthen(self) -> None:
        """Call it before a pause, in which some ranks may be late for the next step."""
        self._set(LONG)

    def _set(self, timeout: timedelta) -> None:
        if timeout == self._current:
            return
        self._current = timeout
        for group in list(distributed_c10d._world.pg_map):
            if group not in self._excluded:
                distributed_c10d._set_pg_timeout(timeout, group)
