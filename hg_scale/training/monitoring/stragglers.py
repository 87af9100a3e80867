"""Find slow ranks by their own time: reading data and the module's forward.

The time of a step is the same on all ranks, since they wait for each other. A rank's own time ends
before it waits. (Backward is left out, as it overlaps with the reduction of gradients.) Within a
tensor-parallel group, and under ZeRO 3, the forward itself contains collectives: the ranks of a
group share its time, and only the time of reading differs. Pipeline communication is not included.
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

_IN_A_ROW = 5  # slow logged steps before a rank warns


class RankTimer:
    """Times this rank's reading and forward, and reports them to the heartbeat as local work.

    On a GPU, events time the forward. They are read when a later step begins: they have completed
    by then, so that no synchronisation is needed.
    """

    def __init__(self, heartbeat: Heartbeat, device: torch.device) -> None:
        self._heartbeat, self._cuda = heartbeat, device.type == "cuda"
        self._data = self._forward = 0.0  # seconds since the last `collect`
        self._forward_start = 0.0
        self._start_event: Any = None  # of the forward in progress
        self._pairs: list[tuple[Any, Any]] = []  # start and end events not read yet
        self._free: list[Any] = []
        self._steps = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Surround the reading of a step's data."""
        self._steps += 1
        self._read_events()
        self._heartbeat.begin("data")
        start = time.perf_counter()
        try:
            yield
        finally:
            self._data += time.perf_counter() - start
            self._heartbeat.end()

    def attach(self, module: nn.Module) -> None:
        """Time every forward of `module` in training mode."""
        module.register_forward_pre_hook(self._before_forward)
        module.register_forward_hook(self._after_forward)

    def collect(self) -> tuple[float, float]:
        """Return mean seconds per step of reading and of forward since the last call."""
        self._read_events()
        steps = max(1, self._steps)
        averages = self._data / steps, self._forward / steps
        self._data = self._forward = 0.0
        self._steps = 0
        return averages

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        self._heartbeat.begin("forward")
        if not module.training:
            return
        if self._cuda:
            self._start_event = self._record_event()
        else:
            self._forward_start = time.perf_counter()

    def _after_forward(self, module: nn.Module, *_: Any) -> None:
        self._heartbeat.end()
        if not module.training:
            return
        if self._cuda:
            self._pairs.append((self._start_event, self._record_event()))
        else:
            self._forward += time.perf_counter() - self._forward_start

    def _record_event(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_events(self) -> None:
        """Add the times of completed events: of all, once the loss of their step was read."""
        while self._pairs and self._pairs[0][1].query():
            pair = self._pairs.pop(0)
            self._forward += pair[0].elapsed_time(pair[1]) / 1000
            self._free += pair


class Stragglers:
    """Compares the own times of all ranks at logged steps.

    `per_stage`: ranks of a pipeline stage. Stages differ by design, so a rank is compared with the
    median of its stage. A rank that takes `threshold` times the median, several times in a row,
    warns once.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        timer: RankTimer,
        device: torch.device,
        per_stage: int,
        threshold: float,
        warn: Callable[[str], None],
    ) -> None:
        self._heartbeat, self._timer, self._device = heartbeat, timer, device
        self._per_stage, self._threshold, self._warn = per_stage, threshold, warn
        self._records = 0
        self._slow = 0  # logged steps in a row in which this rank was slow

    def record(self) -> dict[str, Any]:
        """Return `slowest_rank` and `slowest_ratio` since the last call. A collective."""
        rank, world = self._heartbeat.rank, self._heartbeat.world_size
        own = self._timer.collect()
        self._heartbeat.own_seconds = {"data_seconds": own[0], "forward_seconds": own[1]}
        if world == 1:
            return {}
        each = torch.zeros(world, 2, dtype=torch.float32, device=self._device)
        each[rank] = torch.tensor(own)
        dist.all_reduce(each)
        table = each.tolist()
        ratios, medians = compare_within_stages([sum(times) for times in table], self._per_stage)
        self._records += 1
        self._warn_if_slow(ratios[rank], medians[rank // self._per_stage], own)
        if rank == 0:
            rows = [
                {"rank": r, "data_seconds": data, "forward_seconds": forward, "ratio": ratios[r]}
                for r, (data, forward) in enumerate(table)
            ]
            step = self._heartbeat.position.step
            self._heartbeat.table = {"step": step, "threshold": self._threshold, "ranks": rows}
        slowest = max(range(world), key=ratios.__getitem__)
        return {"slowest_rank": slowest, "slowest_ratio": ratios[slowest]}

    def _warn_if_slow(self, ratio: float, median: float, own: Sequence[float]) -> None:
        first = self._records == 1  # it includes compilation
        if first or not self._threshold or ratio < self._threshold:
            self._slow = 0
            return
        self._slow += 1
        if self._slow == _IN_A_ROW:
            self._warn(
                f"this rank ({self._heartbeat.host}) is slow, {ratio:.2f} x the median of its "
                f"pipeline stage: {own[0]:.3g} s of reading data and {own[1]:.3g} s of forward per "
                f"step, median {median:.3g} s in all"
            )


def compare_within_stages(own: Sequence[float], per_stage: int) -> tuple[list[float], list[float]]:
    """Return each rank's time over the median of its stage, and the (lower) median per stage."""
    stages = [own[start : start + per_stage] for start in range(0, len(own), per_stage)]
    medians = [statistics.median_low(stage) for stage in stages]
    ratios = [
        seconds / median if median else 1.0
        for stage, median in zip(stages, medians, strict=True)
        for seconds in stage
    ]
    return ratios, medians
