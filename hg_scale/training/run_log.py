"""Where the records of a run go: `metrics.jsonl`, the terminal, TensorBoard and wandb."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from hg_scale.config.schema import Config
from hg_scale.errors import UserError
from hg_scale.run_starts import record_start
from hg_scale.training.console import Console
from hg_scale.training.metrics import MetricsLog, MetricsRecord
from hg_scale.training.monitoring.events import EventSender
from hg_scale.training.tensorboard_log import TensorBoardLog
from hg_scale.training.wandb_log import WandbLog


class RunLog:
    """Writes records to `metrics.jsonl`, the terminal, and others if configured; on rank 0."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        console: Console,
        step: int,
        rank: int,
        *,
        ranks: int = 1,
        began: float | None = None,
        events: EventSender | None = None,
    ) -> None:
        """`step`: the last one that is done. `ranks`: of the run. `began`: when its process did."""
        self.console = console
        self._events = events
        self._tags: MetricsRecord = {}  # in every line
        self._metrics: MetricsLog | None = None
        self._wandb: WandbLog | None = None
        self._tensorboard: TensorBoardLog | None = None
        if rank == 0:
            try:
                (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
                start = record_start(folder, began or time.time(), step, ranks)
                self._tags = {"job": start.job, "start": start.start}
                self._metrics = MetricsLog(folder, step, console.warn)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error}") from None
            if config.logging.tensorboard:
                self._tensorboard = TensorBoardLog(folder, step, console.warn)
            if config.logging.wandb_project:
                self._wandb = WandbLog(
                    folder,
                    config.logging.wandb_project,
                    config.logging.wandb_name,
                    config.model_dump(),
                    warn=console.warn,
                    resume_step=step,
                )

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`, which is done."""
        self.console.advance(step)

    def write(self, record: MetricsRecord) -> None:
        """Write the record of a logged step, a validation, or a skipped step."""
        record = record | self._tags
        show: Callable[[MetricsRecord], None] = self.console.step
        if "validation_loss" in record:
            show = self.console.validation
        elif "skipped" in record:
            show = self.console.skipped
            if self._events:
                self._events.send("bad_step", record["skipped"], record["step"])
        show(record)
        if self._metrics:
            self._metrics.write(record)
        if self._tensorboard:
            self._tensorboard.log(record)
        if self._wandb:
            self._wandb.log(record)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._metrics:
            self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))
