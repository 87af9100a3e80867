"""Ranks that may die, shared by the tests here."""

from __future__ import annotations

import pytest

from tests.faults.worlds import MODULES
from tests.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Forks:
    return Forks(*MODULES)
