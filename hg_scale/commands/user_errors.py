"""Errors that several commands report in one line instead of a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hg_scale.errors import UserError


@contextmanager
def report_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into a UserError; a context manager and a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from hg_scale.parallel.runtime_errors import out_of_memory  # imports torch

        if out_of_memory(error) is None:
            raise
        raise UserError(
            "out of memory; a smaller --batch, shorter windows (--context, --window) or fewer "
            "--tokens need less"
        ) from None


def refuse_unwritable(path: Path) -> None:
    """Raise UserError if `path` cannot be written, before any work is done. Leaves it unchanged."""
    is_new = not os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if is_new:
        path.unlink()
