"""Ranks that are killed at random moments cost a run nothing but time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.kills import kill_again_and_again, prepare

pytestmark = pytest.mark.cluster


def test_five_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, prepare(tmp_path), kills=5, size=2, seed=1, tell=print)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, prepare(tmp_path), kills=50, size=2, seed=2, tell=print)
