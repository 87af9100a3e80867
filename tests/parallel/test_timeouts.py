"""How long ranks wait for each other, group by group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hg_scale.parallel.timeouts import LONG, Timeouts
from tests.world import Worlds

SHORT = 0.5


def wait_for_the_other() -> list[str]:
    """What rank 0 meets where rank 1 comes when it has given up."""
    both = dist.group.WORLD
    pair, spared = dist.new_group(), dist.new_group(backend="gloo", timeout=LONG)
    timeouts = Timeouts(SHORT, [spared])
    met = []
    for moves, groups in (((timeouts.shorten,), (pair,)), ((timeouts.lengthen,), (both, spared))):
        for move in moves:
            move()
        for group in groups:
            met.append(_meet(group))
    return met


def _meet(group: dist.ProcessGroup | None) -> str:
    """The first rank comes at once, the other one when it has waited twice the short time."""
    import time

    if dist.get_rank() == 1:
        time.sleep(2 * SHORT)
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return "Timed out" if "Timed out" in str(error) else "closed"
    return ""


def test_short_and_long(worlds: Worlds) -> None:
    first, second = worlds.run(2, wait_for_the_other)
    assert first == ["Timed out", "", ""]
    assert second == ["closed", "", ""]


def spared() -> str:
    group = dist.new_group(backend="gloo", timeout=LONG)
    Timeouts(SHORT, [group]).shorten()
    return _meet(group)


def test_groups_that_wait_for_the_disk_are_spared(worlds: Worlds) -> None:
    assert worlds.run(2, spared) == ["", ""]


@pytest.mark.parametrize(
    ("watched", "expected"),
    [(0, 600), (300, 600), (569, 600), (571, 1200), (900, 1200), (1175, 1800), (1800, 1800)],
)
def test_groups_wait_until_the_watchdog_has_spoken(
    worlds: Worlds, watched: float, expected: float
) -> None:
    assert worlds.run(1, shortened, watched) == [expected]


def shortened(watched: float) -> float:
    timeouts = Timeouts(600)
    timeouts.shorten(watched)
    seconds = timeouts._now.total_seconds()
    timeouts.lengthen()
    return seconds


def test_a_time_beyond_all_clocks_is_the_long_one() -> None:
    assert Timeouts(1e300)._short == LONG
