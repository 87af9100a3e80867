"""Runs whose ranks are killed at random moments end with the curve of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.kills import kill_repeatedly, prepare

pytestmark = pytest.mark.cluster


def test_curve_after_five_kills(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path, prepare(tmp_path), kills=5, size=2, seed=1, report=print)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_curve_after_fifty_kills(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path, prepare(tmp_path), kills=50, size=2, seed=2, report=print)
