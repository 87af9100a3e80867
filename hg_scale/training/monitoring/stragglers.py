"""Which ranks are slow, from the time that each needs by itself.

The time of a step is alike on all ranks, since they wait for each other. A rank's own time is what
it spends before it meets the others: reading its data, and in the module's forward. (Backward
overlaps with the reduction of gradients.) Within a tensor-parallel group, and under ZeRO 3, the
forward itself holds collective operations: there the ranks of a group share its time, and only
reading tells them apart. A pipeline's waiting is outside of the forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hg_scale.training.monitoring.heartbeat import Heartbeat

_IN_A_ROW = 5  # logged steps that a rank is slow before it says so


class OwnTime:
    """Clocks what this rank does by itself, and says so to the heartbeat.

    On a GPU the forward is timed there, by events: read when a later step begins, for then they
    are over, so that nothing is waited for.
    """

    def __init__(self, heart: Heartbeat, device: torch.device) -> None:
        self._heart, self._cuda = heart, device.type == "cuda"
        self._data = self._forward = 0.0
        self._begun = 0.0
        self._open: Any = None  # the event that began the running forward
        self._pairs: list[tuple[Any, Any]] = []
        self._free: list[Any] = []
        self._steps = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the reading of a step's data."""
        self._steps += 1
        self._settle()
        self._heart.begin("data")
        start = time.perf_counter()
        try:
            yield
        finally:
            self._data += time.perf_counter() - start
            self._heart.end()

    def attach(self, module: nn.Module) -> None:
        """Clock each forward of `module` in training."""
        module.register_forward_pre_hook(self._forward_begins)
        module.register_forward_hook(self._forward_ends)

    def collect(self) -> tuple[float, float]:
        """Seconds a step of reading and of forward, since the last call."""
        self._settle()
        steps = max(1, self._steps)
        averages = self._data / steps, self._forward / steps
        self._data = self._forward = 0.0
        self._steps = 0
        return averages

    def _forward_begins(self, module: nn.Module, _: Any) -> None:
        self._heart.begin("forward")
        if not module.training:
            return
        if self._cuda:
            self._open = self._record()
        else:
            self._begun = time.perf_counter()

    def _forward_ends(self, module: nn.Module, *_: Any) -> None:
        self._heart.end()
        if not module.training:
            return
        if self._cuda:
            self._pairs.append((self._open, self._record()))
        else:
            self._forward += time.perf_counter() - self._begun

    def _record(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        """Read the events that are over: all of them, once a step has given its loss."""
        while self._pairs and self._pairs[0][1].query():
            pair = self._pairs.pop(0)
            self._forward += pair[0].elapsed_time(pair[1]) / 1000
            self._free += pair


class Stragglers:
    """The table of all ranks' own times, made at logged steps.

    `per_stage`: ranks of a pipeline stage; stages differ by design, so a rank is compared with the
    median of its own. A rank that takes `ratio` times that, several times in a row, warns once.
    """

    def __init__(
        self,
        heart: Heartbeat,
        own: OwnTime,
        device: torch.device,
        per_stage: int,
        ratio: float,
        warn: Callable[[str], None],
    ) -> None:
        self._heart, self._own, self._device, self._per_stage = heart, own, device, per_stage
        self._ratio, self._warn = ratio, warn
        self._slow, self._records = 0, 0  # logged steps in a row that this rank was slow

    def record(self) -> dict[str, Any]:
        """`slowest_rank` and `slowest_ratio`, since the last call. A collective of all ranks."""
        rank, world = self._heart.rank, self._heart.world_size
        here = self._own.collect()
        self._heart.own = {"data_seconds": here[0], "forward_seconds": here[1]}
        if world == 1:
            return {}
        each = torch.zeros(world, 2, dtype=torch.float32, device=self._device)
        each[rank] = torch.tensor(here)
        dist.all_reduce(each)
        table = each.tolist()
        ratios, medians = compare([data + forward for data, forward in table], self._per_stage)
        self._records += 1
        self._tell(ratios[rank], medians[rank // self._per_stage], here)
        if rank == 0:
            rows = [
                {"rank": r, "data_seconds": data, "forward_seconds": forward, "ratio": ratios[r]}
                for r, (data, forward) in enumerate(table)
            ]
            step, threshold = self._heart.place.step, self._ratio
            self._heart.table = {"step": step, "threshold": threshold, "ranks": rows}
        slowest = max(range(world), key=ratios.__getitem__)
        return {"slowest_rank": slowest, "slowest_ratio": ratios[slowest]}

    def _tell(self, ratio: float, median: float, here: Sequence[float]) -> None:
        if self._records == 1 or not self._ratio or ratio < self._ratio:  # the first step compiles
            self._slow = 0
            return
        self._slow += 1
        if self._slow == _IN_A_ROW:
            self._warn(
                f"this rank ({self._heart.host}) is slow, {ratio:.2f} x the others of its stage: "
                f"before it meets them, a step takes it {here[0]:.3g} s of reading data and "
                f"{here[1]:.3g} s of forward, and the median of them {median:.3g} s together"
            )


def compare(own: Sequence[float], per_stage: int) -> tuple[list[float], list[float]]:
    """Each rank's time by the median of its stage, and these medians (of two, the faster)."""
    stages = [own[begin : begin + per_stage] for begin in range(0, len(own), per_stage)]
    medians = [statistics.median_low(stage) for stage in stages]
    ratios = [
        seconds / median if median else 1.0
        for stage, median in zip(stages, medians, strict=True)
        for seconds in stage
    ]
    return ratios, medians
