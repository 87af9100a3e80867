"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

from tests.world import Worlds  # noqa: E402


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Worlds of processes, shared by all tests of the session."""
    pool = Worlds()
    yield pool
    pool.close()
