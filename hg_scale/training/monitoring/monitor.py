"""Heartbeat, watchdog and stragglers of a rank, as the loop sees them."""

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
from hg_scale.training.monitoring.stragglers import OwnTime, Stragglers
from hg_scale.training.monitoring.watchdog import Watchdog, clear_alarm, limit_of, period_of

if TYPE_CHECKING:
    from hg_scale.training.console import Console
    from hg_scale.training.engine import Engine


class Monitor:
    """What training tells those who watch it; a few microseconds a step."""

    def __init__(
        self, config: Config, heart: Heartbeat, own: OwnTime, stragglers: Stragglers
    ) -> None:
        self._config = config
        self._heart, self._own, self._stragglers = heart, own, stragglers

    @property
    def patience(self) -> float:
        """Seconds after which the next step is ended as hanging, with the names of who is late.

        0: never, or not before `parallel.timeout`, which is set below all limits.
        """
        watchdog = self._config.watchdog
        if not watchdog.factor or self._config.parallel.timeout < watchdog.at_least:
            return 0.0
        return limit_of(watchdog, "step", list(self._heart.durations)).seconds

    def enter(self, phase: RunPhase, step: int) -> None:
        """A step begins, or a pause after one."""
        self._heart.enter(phase, step)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around all steps. However they end, what follows is the end: a save may be under way, for
        longer than a step may take."""
        try:
            yield
        finally:
            self._heart.enter("end", self._heart.place.step)

    def reading(self) -> AbstractContextManager[None]:
        """Around what this rank reads of a step's data."""
        return self._own.reading()

    def attach(self, engine: Engine) -> None:
        """Clock the engine's forward."""
        self._own.attach(engine.model)

    def record(self) -> dict[str, Any]:
        """Figures for a logged step. A collective operation of all ranks."""
        return self._stragglers.record()


@contextmanager
def monitor_run(
    config: Config, run: Path, launch: Launch, console: Console, device: torch.device
) -> Iterator[Monitor]:
    """While this lasts, the rank's heart beats and its watchdog watches.

    A collective operation of all ranks, at the beginning.
    """

    def clear() -> None:
        if launch.rank == 0:
            clear_ranks(run)
            clear_alarm(run)

    run_on_all_ranks(clear, device)
    per_stage = launch.world_size // config.parallel.pipeline
    warn: Callable[[str], None] = console.warn
    heart = Heartbeat(run, launch.rank, launch.world_size, warn, period_of(config.watchdog))
    own = OwnTime(heart, device)
    stragglers = Stragglers(heart, own, device, per_stage, config.watchdog.slow_rank, warn)
    with heart, Watchdog(heart, config.watchdog, run, per_stage, console.print_unlocked):
        yield Monitor(config, heart, own, stragglers)
