"""Saving while training goes on.

The loop waits for the copy to host memory; a thread writes it. The ranks' threads confirm to each
other over a process group of their own (gloo), so that their collective operations neither mix
with those of training nor wait for a step to end. What fails costs that checkpoint only.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.rank_file import HostBuffer, Staged, gather
from hg_scale.checkpoint.retention import Keep
from hg_scale.checkpoint.save import write_checkpoint
from hg_scale.config.schema import Config
from hg_scale.convert.source import parameter_shapes
from hg_scale.parallel.runtime_errors import connection_error
from hg_scale.parallel.timeouts import LONG
from hg_scale.training.agreement import stop_all
from hg_scale.training.state import TrainingProgress, describe_state, written_here

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine

_PATIENCE = 30.0  # seconds for a save under way when a rank is gone
_NICE = 19  # of the writing thread: it takes what processor time training leaves


class Checkpointer:
    """Writes a run's checkpoints. Make it, use it and close it on all ranks alike.

    A save that fails is warned of and older checkpoints stay. Use it as a context manager: the end
    waits for the last save, and raises CheckpointError where that, of step `last_step`, failed.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        config: Config,
        *,
        last_step: int,
        warn: Callable[[str], None],
        damaged: Collection[Path] = (),
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        """`damaged` are checkpoints known to be so, that are not to count among those kept.

        `permit` is asked on rank 0 before each save, and raises what forbids it.
        """
        self._engine, self._folder, self._config = engine, folder, config
        self._last_step, self._warn, self._damaged = last_step, warn, damaged
        self._permit = permit
        self._names = parameter_shapes(config.model).keys()
        self._written_in = 0.0  # seconds of the save before
        self._keep = Keep(config.checkpoint.keep_last, config.checkpoint.keep_every)
        self.group = dist.new_group(backend="gloo", timeout=LONG)  # it waits for disks
        self._buffer = HostBuffer()
        self._thread: ThreadPoolExecutor | None = None
        if config.checkpoint.async_:
            self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_yield_to_training)
        self._pending: Future[None] | None = None
        self._last_fault: CheckpointError | None = None

    @property
    def seconds(self) -> float:
        """What a save would take now, by the one before; 0 where there was none."""
        return self._written_in * (2 if self.busy else 1)

    def save(self, progress: TrainingProgress, last: bool = False) -> None:
        """Save where training stands; first waits for the save before. `last`: none follows."""
        start = time.monotonic()
        self.wait()
        if last:
            self._last_step = progress.step
        meta = describe_state(self._engine, progress, self._config)
        staged = gather(written_here(self._engine))
        if self._thread is None:
            self._write(progress.step, lambda: staged, meta, start)
            return
        copied = self._copy(staged)
        self._pending = self._thread.submit(self._write, progress.step, copied, meta, start)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Until nothing is being written any more."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def _copy(self, staged: Staged) -> Callable[[], Staged]:
        """The state in host memory; a fault is kept until the ranks speak about it."""
        try:
            copy = self._buffer.copy(staged)
        except (RuntimeError, MemoryError) as error:
            fault = MemoryError(f"no host memory for a copy of its state: {first_line(error)}")

            def fail() -> Staged:
                raise fault

            return fail
        return lambda: copy

    def _write(
        self, step: int, staged: Callable[[], Staged], meta: dict[str, Any], start: float
    ) -> None:
        self._last_fault = None
        try:
            write_checkpoint(
                self._folder,
                step,
                staged,
                meta,
                group=self.group,
                keep=self._keep,
                damaged=self._damaged,
                warn=self._warn,
                permit=self._permit,
                names=self._names,
            )
        except CheckpointError as error:
            self._last_fault = error
        except (
            RuntimeError,
            OSError,
        ) as error:  # of gloo: training on this rank is about to meet it, too
            self._last_fault = CheckpointError(f"not saved: a rank is gone: {first_line(error)}")
            self._last_fault.__cause__ = error
        self._written_in = time.monotonic() - start
        if self._last_fault and step != self._last_step and dist.get_rank() == 0:
            self._warn(
                f"step {step} {self._last_fault}; older checkpoints are kept, the run goes on"
            )

    def close(self, patience: float | None = None) -> None:
        """Wait, `patience` seconds at most, and end the thread."""
        done = self._pending is None or bool(wait([self._pending], patience).done)
        if done:
            self.wait()
        if self._thread:
            self._thread.shutdown(wait=done)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        # What a lost rank interrupts may still become whole, and may as well wait for it in vain.
        self.close(_PATIENCE if error and connection_error(error) else None)
        if kind is None and self._last_fault:
            if isinstance(cause := self._last_fault.__cause__, RuntimeError):
                raise cause
            fault = f"step {self._last_step} {self._last_fault}; mend that and start again: the run"
            stop_all(CheckpointError(f"{fault} goes on from the checkpoint before"), teller=0)


def _yield_to_training() -> None:
    """Lower this thread's priority, where a thread has one of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error) or type(error).__name__).splitlines()[0]
