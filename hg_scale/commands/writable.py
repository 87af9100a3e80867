"""Whether a file can be written: asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from hg_scale.errors import UserError


def refuse_unwritable(path: Path) -> None:
    """Raises UserError where `path` cannot be written; leaves it as it was."""
    new = not os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if new:
        path.unlink()
