"""Fixtures for runs whose ranks may die."""

from __future__ import annotations

import pytest

from tests.faults.worlds import MODULES
from tests.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Forks:
    return Forks(*MODULES)
