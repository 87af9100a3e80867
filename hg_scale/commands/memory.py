"""A line in place of a traceback where what was asked for does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hg_scale.errors import UserError


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Raise UserError for a lack of memory; also stands above a function. No other fault."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from hg_scale.training.failures import out_of_memory

        if out_of_memory(error) is None:
            raise
        raise UserError(
            "out of memory; a smaller --batch, shorter windows (--context, --window) or fewer "
            "--tokens need less"
        ) from None
