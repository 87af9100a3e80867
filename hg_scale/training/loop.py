"""The training loop, to be read in one sitting."""

from __future__ import annotations

from itertools import islice
from math import log, nan
from time import perf_counter
from typing import TYPE_CHECKING

from hg_scale.config.schema import Config
from hg_scale.model.costs import training_flops_per_token
from hg_scale.parallel.timeouts import Timeouts
from hg_scale.training.batch_loader import BatchLoader
from hg_scale.training.interruption import Interruption
from hg_scale.training.metrics import MetricsRecord, StepTimer, gpu_usage, memory_usage
from hg_scale.training.monitoring.monitor import Monitor
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.run_log import RunLog
from hg_scale.training.schedule import LearningRateSchedule
from hg_scale.training.validation import Validator

if TYPE_CHECKING:
    from hg_scale.training.checkpointer import Checkpointer
    from hg_scale.training.engine import Engine, StepResult
    from hg_scale.training.state import TrainingProgress

LN2 = log(2)
BATCHES_PER_CHECK = 16  # validation batches between two checks for an interruption


class Trainer:
    """Trains from `progress.step` on: `fit` is the loop, the other methods are its parts."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        progress: TrainingProgress,
        *,
        loader: BatchLoader,
        validator: Validator,
        checkpointer: Checkpointer,
        log: RunLog,
        monitor: Monitor,
        interruption: Interruption,
        profiler: StepProfiler,
        meter: Meter,
    ) -> None:
        self.config, self.engine, self.progress = config, engine, progress
        self.loader, self.validator, self.checkpointer = loader, validator, checkpointer
        self.log, self.monitor, self.interruption = log, monitor, interruption
        self.profiler, self.meter = profiler, meter
        self.learning_rate = LearningRateSchedule.from_config(config)
        self.timeouts = Timeouts(config.parallel.timeout, [checkpointer.group])
        self.validation_seconds = 0.0  # of the last validation

    def fit(self, last_step: int) -> str | None:
        """Train to `last_step`, logging, saving and validating on the way.

        Returns None at `last_step`, or why all ranks stopped before it, saved.
        """
        config, timer = self.config, self.meter.timer
        self.log.advance(self.progress.step)
        if interrupted := self.interruption.stop_reason(self.progress.step, self.engine.device):
            return interrupted
        for step in range(self.progress.step + 1, last_step + 1):
            last, final = step == last_step, step == config.training.steps
            validates = due(step, config.training.validate_every, final)
            result = self.train_step(step)
            interrupted = None if last else self.check_interruption(step, validates)
            last = last or interrupted is not None
            self.timeouts.shorten(self.monitor.step_limit)

            if result.skip_reason:
                self.log.write(skipped_record(self.progress, result))
                self.engine.guard.require_progress(
                    step, result.skip_reason, self.checkpointer.folder
                )
            if step == 1 or due(step, config.logging.every, last):
                self.log.write(self.meter.record(self, result))
            with timer.measure("paused"):
                saves = due(step, config.checkpoint.every, last)
                if saves:  # before the validation, whose data may be corrupt
                    self.save(last)
                if self.validator.parts and validates and not interrupted:
                    interrupted = self.validate(step, may_stop=not final)
                    if interrupted and not saves:
                        self.save(last=True)
                if interrupted:
                    return interrupted
        return None

    def train_step(self, step: int) -> StepResult:
        """Read a batch and take one optimizer step."""
        timer, self.step_start = self.meter.timer, perf_counter()
        self.monitor.enter("step", step)
        with self.profiler.step(step):
            with timer.measure("data"):
                batch = self.loader.next()
            with timer.measure("compute"):
                result = self.engine.train_step(batch, step, self.learning_rate(step))
        self.progress.step, self.progress.position = step, self.loader.position
        self.progress.skipped += result.skipped
        timer.count_step(self.meter.tokens_per_step)
        self.log.advance(step)
        return result

    def check_interruption(self, step: int, validates: bool) -> str | None:
        """Return why all ranks have to save and stop after this step, or None. A collective."""
        seconds = perf_counter() - self.step_start
        saves = 1 + due(step, self.config.checkpoint.every, last=False)
        ahead = self.checkpointer.seconds * saves + self.validation_seconds * validates
        return self.interruption.stop_reason(step, self.engine.device, seconds, ahead)

    def save(self, last: bool) -> None:
        """Save a checkpoint; wait for the `last` one."""
        self.monitor.enter("save", self.progress.step)
        self.timeouts.lengthen()
        self.progress.data = self.loader.state()
        self.checkpointer.save(self.progress, last)

    def validate(self, step: int, may_stop: bool) -> str | None:
        """Log the loss over the validation splits, every token scored once.

        With `may_stop`, all ranks stop early on an interruption, and the reason is returned. The
        validation after the final step must not stop: no later one would replace it.
        """
        self.monitor.enter("validation", step)
        self.timeouts.lengthen()
        engine, validator, start, nats = self.engine, self.validator, perf_counter(), []
        length = self.config.model.sequence_length
        for part in validator.parts:
            batches, total = validator.batches(part), 0.0
            for _ in range(0, validator.count(part), BATCHES_PER_CHECK):
                total += engine.evaluate(islice(batches, BATCHES_PER_CHECK), length)
                if may_stop:
                    ahead = self.checkpointer.seconds
                    reason = self.interruption.stop_reason(step, engine.device, ahead=ahead)
                    if reason:
                        return reason
            nats.append(total)
            validator.settle()
        self.validation_seconds = perf_counter() - start
        record = validator.record(nats) | {"validation_seconds": self.validation_seconds}
        self.log.write({"step": step} | record)
        return None


def due(step: int, every: int, last: bool) -> bool:
    """Whether an action that is due every `every` steps (0: only after the last) is due now."""
    return last or (every > 0 and step % every == 0)


def skipped_record(progress: TrainingProgress, result: StepResult) -> MetricsRecord:
    """The record of a skipped step; only logged steps have the key `loss`."""
    return {
        "step": progress.step,
        "skipped": result.skip_reason,
        "skipped_loss": result.loss,
        "skipped_steps": progress.skipped,
    }


class Meter:
    """The record of a logged step: the step's loss, and rates since the last logged step."""

    def __init__(self, config: Config, bytes_per_token: float, peak_flops: float) -> None:
        """`peak_flops`: FLOP/s of all devices together; `bytes_per_token`: of the training text."""
        self.timer = StepTimer()
        self.tokens_per_step = config.training.global_batch_size * config.model.sequence_length
        self.bytes_per_token, self.peak_flops = bytes_per_token, peak_flops
        self.flops_per_token = training_flops_per_token(config.model)

    def record(self, trainer: Trainer, result: StepResult) -> MetricsRecord:
        """The record for `metrics.jsonl`. A collective."""
        times, loader, progress = self.timer.collect(), trainer.loader, trainer.progress
        loss = result.loss / loader.scored if loader.scored else nan
        flops_per_second = times["tokens_per_second"] * self.flops_per_token
        return {
            "step": progress.step,
            "loss": loss,
            "bits_per_byte": loss / LN2 / self.bytes_per_token,
            "grad_norm": result.grad_norm,
            "learning_rate": trainer.learning_rate(progress.step),
            "tokens": progress.position,
            "epoch": min(loader.epochs.values()),
            "epochs": loader.epochs,
            **times,
            **loader.waits(),
            **trainer.monitor.record(),
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / self.peak_flops,
            "skipped_steps": progress.skipped,
            "skipped_windows": len(loader.skipped),
            **memory_usage(),
            **gpu_usage(),
            **result.norms,
        }
