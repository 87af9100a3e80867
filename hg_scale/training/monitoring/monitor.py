"""Heartbeat, watchdog and straggler table of a rank, behind one interface for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hg_scale.config.schema import Config
from hg_scale.parallel.launch import Launch
from hg_scale.training.agreement import run_on_all_ranks
from hg_scale.training.monitoring.heartbeat import Heartbeat, RunPhase, clear_ranks
from hg_scale.training.monitoring.run_end import clear_run_end
from hg_scale.training.monitoring.stragglers import RankTimer, Stragglers
from hg_scale.training.monitoring.watchdog import (
    Watchdog,
    clear_alarm,
    hang_limit,
    heartbeat_period,
)

if TYPE_CHECKING:
    from hg_scale.training.console import Console
    from hg_scale.training.engine import Engine


class Monitor:
    """Receives the progress of the training loop; costs a few microseconds per step."""

    def __init__(
        self, config: Config, heartbeat: Heartbeat, timer: RankTimer, stragglers: Stragglers
    ) -> None:
        self._config = config
        self._heartbeat, self._timer, self._stragglers = heartbeat, timer, stragglers

    @property
    def step_limit(self) -> float:
        """Seconds after which the watchdog ends the next step as hanging.

        0 if the watchdog is off, or if `parallel.timeout` is below all of its limits.
        """
        watchdog = self._config.watchdog
        if not watchdog.factor or self._config.parallel.timeout < watchdog.at_least:
            return 0.0
        return hang_limit(watchdog, "step", list(self._heartbeat.durations)).seconds

    def enter(self, phase: RunPhase, step: int) -> None:
        """Begin a step, or a phase after step `step`."""
        self._heartbeat.enter(phase, step)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Surround all steps. Afterwards, also after an error, the phase is "end": a save that is
        still being written may take longer than a step."""
        try:
            yield
        finally:
            self._heartbeat.enter("end", self._heartbeat.position.step)

    def reading(self) -> AbstractContextManager[None]:
        """Surround the reading of a step's data on this rank."""
        return self._timer.reading()

    def attach(self, engine: Engine) -> None:
        """Time the forward passes of the engine."""
        self._timer.attach(engine.model)

    def record(self) -> dict[str, Any]:
        """Return the straggler metrics of a logged step. A collective of all ranks."""
        return self._stragglers.record()


@contextmanager
def monitor_run(
    config: Config, run: Path, launch: Launch, console: Console, device: torch.device
) -> Iterator[Monitor]:
    """Run heartbeat and watchdog of this rank. Entering is a collective of all ranks."""

    def clear() -> None:
        if launch.rank == 0:
            clear_ranks(run)
            clear_alarm(run)
            clear_run_end(run)

    run_on_all_ranks(clear, device)
    per_stage = launch.world_size // config.parallel.pipeline
    warn: Callable[[str], None] = console.warn
    period = heartbeat_period(config.watchdog)
    heartbeat = Heartbeat(run, launch.rank, launch.world_size, warn, period)
    timer = RankTimer(heartbeat, device)
    stragglers = Stragglers(heartbeat, timer, device, per_stage, config.watchdog.slow_rank, warn)
    watchdog = Watchdog(heartbeat, config.watchdog, run, per_stage, console.print_unlocked)
    with heartbeat, watchdog:
        yield Monitor(config, heartbeat, timer, stragglers)
