"""Asynchronous checkpoints: training continues while a thread writes.

The loop waits for the copy to host memory only. The writing threads of the ranks confirm to each
other over a gloo group of their own, so that their collectives neither mix with those of training
nor wait for a step to end. A failed save costs that checkpoint only.
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
from hg_scale.checkpoint.rank_file import HostBuffer, Staged, stage
from hg_scale.checkpoint.retention import RetentionPolicy
from hg_scale.checkpoint.save import write_checkpoint
from hg_scale.config.schema import Config
from hg_scale.model.hourglass import parameter_shapes
from hg_scale.parallel.runtime_errors import connection_error
from hg_scale.parallel.timeouts import LONG
from hg_scale.training.agreement import stop_all
from hg_scale.training.state import TrainingProgress, state_metadata, states_to_write

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine

_LAST_SAVE_TIMEOUT = 30.0  # seconds that a running save gets when a rank is lost
_NICE = 19  # priority of the writing thread: training goes first


class Checkpointer:
    """Writes the checkpoints of a run; a context manager, to be used on all ranks.

    A failed save is a warning, and older checkpoints stay. The exit waits for the last save and
    raises CheckpointError if that one, of step `last_step`, failed.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        config: Config,
        *,
        last_step: int,
        warn: Callable[[str], None],
        corrupt: Collection[Path] = (),
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        """`corrupt`: checkpoints that are known to be corrupt and do not count as kept.

        `permit` is called on rank 0 before each save and raises to forbid it.
        """
        self.folder = folder
        self._engine, self._config = engine, config
        self._last_step, self._warn, self._corrupt = last_step, warn, corrupt
        self._permit = permit
        self._names = parameter_shapes(config.model).keys()
        self._save_seconds = 0.0  # of the last save
        self._retention = RetentionPolicy(config.checkpoint.keep_last, config.checkpoint.keep_every)
        self.group = dist.new_group(backend="gloo", timeout=LONG)  # long: it waits for disks
        self._buffer = HostBuffer()
        self._thread: ThreadPoolExecutor | None = None
        if config.checkpoint.async_:
            self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_yield_to_training)
        self._pending: Future[None] | None = None
        self._last_error: CheckpointError | None = None

    @property
    def seconds(self) -> float:
        """Estimated seconds of a save started now, from the last one; 0 before the first."""
        return self._save_seconds * (2 if self.busy else 1)

    def save(self, progress: TrainingProgress, last: bool = False) -> None:
        """Save the current state, after the previous save has ended. `last`: no save follows."""
        start = time.monotonic()
        self.wait()
        if last:
            self._last_step = progress.step
        metadata = state_metadata(self._engine, progress, self._config)
        staged = stage(states_to_write(self._engine))
        if self._thread is None:
            self._write(progress.step, lambda: staged, metadata, start)
            return
        copied = self._copy(staged)
        self._pending = self._thread.submit(self._write, progress.step, copied, metadata, start)

    @property
    def busy(self) -> bool:
        """Whether a save is running."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait for the running save."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def _copy(self, staged: Staged) -> Callable[[], Staged]:
        """Copy to host memory; an error is raised later, where all ranks agree on it."""
        try:
            copy = self._buffer.copy(staged)
        except (RuntimeError, MemoryError) as error:
            failure = MemoryError(f"no host memory for a copy of its state: {first_line(error)}")

            def fail() -> Staged:
                raise failure

            return fail
        return lambda: copy

    def _write(
        self, step: int, staged: Callable[[], Staged], metadata: dict[str, Any], start: float
    ) -> None:
        self._last_error = None
        try:
            write_checkpoint(
                self.folder,
                step,
                staged,
                metadata,
                group=self.group,
                retention=self._retention,
                corrupt=self._corrupt,
                warn=self._warn,
                permit=self._permit,
                names=self._names,
            )
        except CheckpointError as error:
            self._last_error = error
        except (RuntimeError, OSError) as error:  # from gloo: training is about to fail, too
            self._last_error = CheckpointError(f"not saved: lost a rank: {first_line(error)}")
            self._last_error.__cause__ = error
        self._save_seconds = time.monotonic() - start
        if self._last_error and step != self._last_step and dist.get_rank() == 0:
            self._warn(
                f"step {step} {self._last_error}; older checkpoints are kept, the run continues"
            )

    def close(self, timeout: float | None = None) -> None:
        """Wait for the running save, `timeout` seconds at most, and end the thread."""
        done = self._pending is None or bool(wait([self._pending], timeout).done)
        if done:
            self.wait()
        if self._thread:
            self._thread.shutdown(wait=done)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        # When a rank is lost, the running save may still complete, or may wait for it forever.
        self.close(_LAST_SAVE_TIMEOUT if error and connection_error(error) else None)
        if kind is None and self._last_error:
            if isinstance(cause := self._last_error.__cause__, RuntimeError):
                raise cause
            what = f"step {self._last_step} {self._last_error}"
            advice = "fix that and start again: the run resumes from the checkpoint before"
            stop_all(CheckpointError(f"{what}; {advice}"), reporting_rank=0)


def _yield_to_training() -> None:
    """Lower the priority of this thread, on systems where threads have their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
