"""Show the progress of long work: a bar on a terminal, or a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_BAR_SECONDS = 0.1  # between two drawings
_LINE_SECONDS = 30.0  # between two lines of a log


class ProgressBar:
    """Counts the bytes of one stage after another; shows bytes/s and the time left.

    A context manager. Where `stream` is not a terminal, it gets lines; where it is None, nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bars: Any = None
        self._task: Any = None
        self._what, self._total, self._done = "", 0, 0
        self._start, self._before = 0.0, 0
        self._shown = 0.0

    def begin(self, what: str, total: int | None, before: int = 0) -> None:
        """Start a stage of `total` bytes (None: unknown); an earlier run did `before` of them."""
        if self._bars is not None:
            if self._task is not None:
                self._bars.update(self._task, completed=self._done)
            self._task = self._bars.add_task(what, total=total, completed=before)
        self._what, self._total, self._done, self._before = what, total or 0, before, before
        self._start = self._shown = time.monotonic()

    def describe(self, what: str) -> None:
        """Replace the description of the stage."""
        self._what = what
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=what)

    def update(self, done: int) -> None:
        """Set the number of bytes of the stage that are done."""
        self._done = done
        now = time.monotonic()
        if self._bars is not None and self._task is not None:
            if now - self._shown >= _BAR_SECONDS or done >= self._total:
                self._bars.update(self._task, completed=done)
                self._shown = now
        elif self._stream is not None and self._what and now - self._shown >= _LINE_SECONDS:
            print(self._line(now), file=self._stream, flush=True)
            self._shown = now

    def advance(self, count: int) -> None:
        """Add to the number of bytes that are done."""
        self.update(self._done + count)

    def _line(self, now: float) -> str:
        rate = (self._done - self._before) / (now - self._start)
        left = (self._total - self._done) / rate if rate else 0.0
        minutes, seconds = divmod(round(left), 60)
        return (
            f"{self._what}: {self._done / max(self._total, 1):.0%} of {self._total / 1e9:.2f} GB, "
            f"{rate / 1e6:.1f} MB/s, {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        )

    def __enter__(self) -> ProgressBar:
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Bars(*columns, console=Console(file=self._stream))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if self._task is not None:
                self._bars.update(self._task, completed=self._done)
            self._bars.stop()
            self._bars = None


def on_stderr() -> ProgressBar:
    """Return a progress bar for a command line."""
    return ProgressBar(sys.stderr)
