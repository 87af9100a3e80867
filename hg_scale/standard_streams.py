"""Standard output and standard error of a process whose readers may leave before it ends.

A terminal closes, `head` has read enough, the disk under a log is full: training must not end with
the stream that reports on it.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_STREAMS = ("stdin", "stdout", "stderr")  # by file descriptor


class LossyWriter(io.RawIOBase):
    """Writes to a file descriptor, which it does not close, and drops what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data` or drop the rest; returns its size in bytes in any case."""
        left = memoryview(data).cast("B")
        size = len(left)
        with suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return size


def lossy_stream(descriptor: int, encoding: str = "utf-8") -> TextIO:
    """Return a line-buffered text stream to `descriptor` that never raises OSError."""
    writer: Any = LossyWriter(descriptor)
    return io.TextIOWrapper(writer, encoding, errors="backslashreplace", line_buffering=True)


def open_missing_streams() -> None:
    """Open the null device for standard streams that were closed at the start (`>&-`).

    The next file to be opened would get their number, and what libraries print into it.
    """
    for descriptor, name in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


def protect_stderr() -> None:
    """Drop what cannot be written to standard error from now on, instead of raising OSError."""
    _protect("stderr", 2)


def protect_standard_streams() -> None:
    """Drop what cannot be written to stdout or stderr from now on, instead of raising OSError."""
    open_missing_streams()
    _protect("stdout", 1)
    _protect("stderr", 2)


def _protect(name: str, descriptor: int) -> None:
    stream = getattr(sys, name)
    if isinstance(stream, io.TextIOWrapper) and not isinstance(stream.buffer, LossyWriter):
        with suppress(OSError, ValueError):
            if stream.fileno() == descriptor:  # not one that replaces it, as in a test
                setattr(sys, name, lossy_stream(descriptor, stream.encoding))
