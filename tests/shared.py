"""Paths: the repository, and a folder of shared files outside it (HG_SCALE_SHARED)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("HG_SCALE_SHARED", ROOT.parent / "shared"))


def shared(path: str) -> Path:
    """Return the path of a shared file; skip the test where it is missing."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{file} is missing; set HG_SCALE_SHARED")
    return file
