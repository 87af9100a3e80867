"""The training loop, to be read in one sitting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import log, nan
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hg_scale.config.schema import Config
from hg_scale.model.costs import training_flops_per_token
from hg_scale.parallel.timeouts import Timeouts
from hg_scale.training.batch_loader import BatchLoader
from hg_scale.training.device import Peak
from hg_scale.training.interruption import Interruption
from hg_scale.training.metrics import StepTimer, memory_usage
from hg_scale.training.monitoring.monitor import Monitor
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.state import TrainingProgress
from hg_scale.training.validation import Validator

if TYPE_CHECKING:
    from hg_scale.training.checkpointer import Checkpointer
    from hg_scale.training.engine import Engine, StepResult

LN2 = log(2)
STRETCH = 16  # batches of a validation from one question whether to go on to the next
MetricsRecord = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What the loop is given: `log` takes a record a line, `advance` moves the live line."""

    engine: Engine
    batches: BatchLoader
    held_out: Validator | None
    learning_rate: Callable[[int], float]
    log: Callable[[MetricsRecord], None]
    advance: Callable[[int], None]
    saver: Checkpointer
    checkpoints: Path
    interruption: Interruption
    timeouts: Timeouts
    profiler: StepProfiler
    watch: Monitor
    bytes_per_token: float
    peak: Peak


def training_loop(
    config: Config, parts: Parts, progress: TrainingProgress, last_step: int
) -> str | None:
    """Train from `progress.step` to `last_step`, validating, logging and saving on the way.

    Returns what ended it before, on all ranks alike and saved; None at `last_step`.
    """
    timer, device, validation_seconds = StepTimer(), parts.engine.device, 0.0
    parts.advance(progress.step)
    if interrupted := parts.interruption.agreed(progress.step, device):
        return interrupted
    meter = Meter(config, parts, timer)
    for step in range(progress.step + 1, last_step + 1):
        parts.watch.enter("step", step)
        last, finished = step == last_step, step == config.training.steps
        validates = due(step, config.training.validate_every, finished)
        rate, start = parts.learning_rate(step), perf_counter()
        with parts.profiler.step(step):
            with timer.measure("data"):
                batch = parts.batches.next()
            with timer.measure("compute"):
                result = parts.engine.train_step(batch, step, rate)
        progress.step, progress.position = step, parts.batches.position
        progress.skipped += result.skipped
        timer.count_step(meter.tokens)
        parts.advance(step)
        interrupted, seconds = None, perf_counter() - start
        if not last:
            saves = 1 + due(step, config.checkpoint.every, last)
            ahead = parts.saver.seconds * saves + validation_seconds * validates
            interrupted = parts.interruption.agreed(step, device, seconds, ahead)
        last = last or interrupted is not None
        parts.timeouts.shorten(parts.watch.step_limit)

        if result.why:
            parts.log(skipped_step(progress, result))
            parts.engine.guard.require_better(step, result.why, parts.checkpoints)
        if step == 1 or due(step, config.logging.every, last):
            parts.log(meter.record(progress, result, rate))
        with timer.measure("paused"):
            saved = due(step, config.checkpoint.every, last)
            if saved:  # first: a validation may meet bad data
                save(parts, progress, last)
            if parts.held_out and validates and not interrupted:
                # The last one is not cut short: no start would make up for it.
                then = None if finished else parts.saver.seconds
                record, interrupted = validate(parts, parts.held_out, step, then)
                if record:
                    validation_seconds = record["validation_seconds"]
                    parts.log({"step": step} | record)
                elif not saved:
                    save(parts, progress, last=True)
            if interrupted:
                return interrupted
    return None


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps (0: at the end only) happens now."""
    return last or (every > 0 and step % every == 0)


def save(parts: Parts, progress: TrainingProgress, last: bool) -> None:
    """Save a checkpoint; the `last` one is waited for."""
    parts.watch.enter("save", progress.step)
    parts.timeouts.lengthen()
    progress.data = parts.batches.state()
    parts.saver.save(progress, last)


def validate(
    parts: Parts, held_out: Validator, step: int, then: float | None
) -> tuple[MetricsRecord | None, str | None]:
    """Loss over held-out text, each token scored once; or what ended it before, on all ranks alike.

    `then`: seconds that a save takes, should it be interrupted; None: nothing interrupts it.
    """
    parts.watch.enter("validation", step)
    parts.timeouts.lengthen()
    engine, start, nats = parts.engine, perf_counter(), []
    length = engine.config.model.sequence_length
    for part in held_out.parts:
        batches, total = held_out.batches(part), 0.0
        for _ in range(0, held_out.count(part), STRETCH):
            total += engine.evaluate(islice(batches, STRETCH), length)
            if then is not None:
                interrupted = parts.interruption.agreed(step, engine.device, ahead=then)
                if interrupted:
                    return None, interrupted
        nats.append(total)
        held_out.settle()
    return held_out.record(nats) | {"validation_seconds": perf_counter() - start}, None


def skipped_step(progress: TrainingProgress, result: StepResult) -> MetricsRecord:
    """One object for `metrics.jsonl`; `loss` is a key of logged steps alone."""
    return {
        "step": progress.step,
        "skipped": result.why,
        "skipped_loss": result.loss,
        "skipped_steps": progress.skipped,
    }


class Meter:
    """What a logged line says: the last step's loss, and rates over the steps since the last."""

    def __init__(self, config: Config, parts: Parts, timer: StepTimer) -> None:
        self.parts, self.timer = parts, timer
        self.tokens = config.training.global_batch_size * config.model.sequence_length
        self.flops_per_token = training_flops_per_token(config.model)
        self.peak = parts.peak.flops * parts.engine.mesh.world_size

    def record(
        self, progress: TrainingProgress, result: StepResult, learning_rate: float
    ) -> MetricsRecord:
        """One object for `metrics.jsonl`."""
        times, batches = self.timer.collect(), self.parts.batches
        loss = result.loss / batches.scored if batches.scored else nan
        flops_per_second = times["tokens_per_second"] * self.flops_per_token
        return {
            "step": progress.step,
            "loss": loss,
            "bits_per_byte": loss / LN2 / self.parts.bytes_per_token,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "tokens": progress.position,
            "epoch": min(batches.epochs.values()),
            "epochs": batches.epochs,
            **times,
            **batches.waits(),
            **self.parts.watch.record(),
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / self.peak,
            "skipped_steps": progress.skipped,
            "skipped_windows": len(batches.skipped),
            **memory_usage(),
        }
