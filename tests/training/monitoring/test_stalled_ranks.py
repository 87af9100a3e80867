"""Which ranks the others wait for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hg_scale.training.monitoring.stalled_ranks import describe_stalled, stalled_ranks
from tests.training.monitoring.heartbeats import NOW, make_beats

DATA: dict[str, Any] = {"work": "data", "turns": 1}
READ: dict[str, Any] = {"turns": 2}
FORWARD: dict[str, Any] = {"work": "forward", "turns": 3}


def describe(*changes: dict[str, Any], per_stage: int | None = None) -> str:
    return describe_stalled(make_beats(*changes), per_stage or len(changes), NOW)


def test_equal_positions_name_no_rank() -> None:
    assert describe({}, {}, {}) == ""
    assert describe(FORWARD, FORWARD) == ""  # as in a collective of ZeRO 3
    assert describe({}) == ""


def test_an_earlier_position_within_a_step() -> None:
    assert describe({}, DATA, {}) == "rank 1 (n1) is still reading data"
    assert describe(READ, DATA, READ) == "rank 1 (n1) is still reading data"
    assert describe({}, READ) == "rank 1 (n1) has not begun its forward pass"
    assert describe({}, FORWARD) == "rank 1 (n1) is still in its forward pass"
    assert describe({"turns": 8}, {"turns": 6}) == "rank 1 (n1) is still in step 120"


def test_an_earlier_step_or_phase() -> None:
    assert describe({"step": 121, **DATA}, {}) == "rank 1 (n1) is still in step 120"
    saving, validating = ({"phase": phase, "turns": 0} for phase in ("save", "validation"))
    assert describe(saving, {}) == "rank 1 (n1) is still in step 120"
    assert describe(saving, validating) == ""  # a rank may validate while another still saves
    assert describe({"step": 121, **DATA}, saving) == "rank 1 (n1) is still saving after step 120"


def test_ranks_without_a_heartbeat_come_first() -> None:
    silent = {"time": NOW - 312}
    assert describe({}, DATA, silent) == "rank 2 (n2) has sent no heartbeat for 312 s"
    assert describe({}, {**silent, "hung": True}) == ""  # it answered the alarm
    assert describe({}, {"ended": True}) == "rank 1 (n1) has ended"
    beats = make_beats({}, {}, {})
    del beats[1]
    assert describe_stalled(beats, 3, NOW) == "rank 1 has sent no heartbeat"


def test_ranks_in_the_same_state_share_a_clause() -> None:
    assert describe(DATA, {}, DATA, {}) == "ranks 0 (n0), 2 (n2) are still reading data"
    many = describe(READ, *[DATA] * 20)
    assert many.startswith("ranks 1 (n1), ") and many.endswith("and 12 more are still reading data")


def test_a_pipeline_names_the_rank_at_work_not_those_that_wait_for_it() -> None:
    # Two stages of two ranks; the second data-parallel rank of stage 0 hangs in its forward, and
    # the next stage has nothing to do.
    first, stuck, last, starved = {"turns": 10}, {"work": "forward", "turns": 5}, {"turns": 10}, {}
    assert describe(first, stuck, last, starved, per_stage=2) == (
        "rank 1 (n1) is still in its forward pass"
    )
    # One rank per stage: a stage may be ahead of another.
    assert describe({"turns": 6}, {"work": "forward", "turns": 3}, per_stage=1).startswith(
        "rank 1 "
    )
    assert describe({"turns": 6}, {"turns": 4}, per_stage=1) == ""


@given(st.lists(st.sampled_from([DATA, READ, FORWARD, {}, {"time": 0.0}]), min_size=1, max_size=6))
def test_stalled_ranks_are_the_silent_or_those_behind(changes: list[dict[str, Any]]) -> None:
    beats = make_beats(*changes)
    stalled = stalled_ranks(beats, len(beats), NOW)
    silent = [rank for rank, beat in beats.items() if beat.time == 0]
    if silent:
        assert stalled == silent
    else:
        # All ranks read data in the first two turns; those that still do come first.
        reading = [rank for rank, beat in beats.items() if beat.turns < 2]
        some_have_read = len(reading) < len(beats)
        furthest = max(beat.turns for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.turns < furthest]
        assert stalled == (reading if reading and some_have_read else behind)
