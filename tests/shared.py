"""Files that stand beside the repository, or where HG_SCALE_SHARED says: not part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("HG_SCALE_SHARED", ROOT.parent / "shared"))


def shared(path: str) -> Path:
    """A file there; the test is skipped where it is not."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{file} is not there; set HG_SCALE_SHARED")
    return file
