"""Timeouts of process groups while a rank is late."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hg_scale.parallel.timeouts import LONG, Timeouts
from tests.world import Worlds

SHORT = 0.5


def short_then_long() -> list[str]:
    """Outcomes of all-reduces in which rank 1 is late: of a short timeout, then of long ones."""
    pair, excluded = dist.new_group(), dist.new_group(backend="gloo", timeout=LONG)
    timeouts = Timeouts(SHORT, [excluded])
    timeouts.shorten()
    outcomes = [all_reduce_late(pair)]
    timeouts.lengthen()
    return [*outcomes, all_reduce_late(dist.group.WORLD), all_reduce_late(excluded)]


def all_reduce_late(group: dist.ProcessGroup | None) -> str:
    """All-reduce with rank 1 late by twice the short timeout; the error in short, or nothing."""
    import time

    if dist.get_rank() == 1:
        time.sleep(2 * SHORT)
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return "Timed out" if "Timed out" in str(error) else "closed"
    return ""


def test_only_the_short_timeout_ends_the_wait(worlds: Worlds) -> None:
    first, second = worlds.run(2, short_then_long)
    assert first == ["Timed out", "", ""]
    assert second == ["closed", "", ""]


def excluded_group() -> str:
    group = dist.new_group(backend="gloo", timeout=LONG)
    Timeouts(SHORT, [group]).shorten()
    return all_reduce_late(group)


def test_excluded_groups_keep_their_timeout(worlds: Worlds) -> None:
    assert worlds.run(2, excluded_group) == ["", ""]


@pytest.mark.parametrize(
    ("step_limit", "expected"),
    [(0, 600), (300, 600), (569, 600), (571, 1200), (900, 1200), (1175, 1800), (1800, 1800)],
)
def test_the_timeout_outlasts_the_limit_of_the_watchdog(
    worlds: Worlds, step_limit: float, expected: float
) -> None:
    assert worlds.run(1, shortened_timeout, step_limit) == [expected]


def shortened_timeout(step_limit: float) -> float:
    timeouts = Timeouts(600)
    timeouts.shorten(step_limit)
    seconds = timeouts._current.total_seconds()
    timeouts.lengthen()
    return seconds


def test_a_huge_timeout_is_clamped_to_the_long_one() -> None:
    assert Timeouts(1e300)._short == LONG
