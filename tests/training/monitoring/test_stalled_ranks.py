"""Whom the others wait for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hg_scale.training.monitoring.stalled_ranks import describe_stalled, stalled_ranks
from tests.training.monitoring.heartbeats import NOW, make_beats

DATA: dict[str, Any] = {"work": "data", "turns": 1}
READ: dict[str, Any] = {"turns": 2}
FORWARD: dict[str, Any] = {"work": "forward", "turns": 3}


def words(*changes: dict[str, Any], per_stage: int | None = None) -> str:
    return describe_stalled(make_beats(*changes), per_stage or len(changes), NOW)


def test_all_at_one_place_name_nobody() -> None:
    assert words({}, {}, {}) == ""
    assert words(FORWARD, FORWARD) == ""  # as in a collective of ZeRO 3
    assert words({}) == ""


def test_the_place_in_a_step() -> None:
    assert words({}, DATA, {}) == "rank 1 (n1) is still reading data"
    assert words(READ, DATA, READ) == "rank 1 (n1) is still reading data"
    assert words({}, READ) == "rank 1 (n1) has not begun its forward pass"
    assert words({}, FORWARD) == "rank 1 (n1) is still in its forward pass"
    assert words({"turns": 8}, {"turns": 6}) == "rank 1 (n1) is still in step 120"


def test_an_earlier_step_or_phase() -> None:
    assert words({"step": 121, **DATA}, {}) == "rank 1 (n1) is still in step 120"
    saving, validating = ({"phase": phase, "turns": 0} for phase in ("save", "validation"))
    assert words(saving, {}) == "rank 1 (n1) is still in step 120"
    assert words(saving, validating) == ""  # of one rank a validation, of another its save before
    assert words({"step": 121, **DATA}, saving) == "rank 1 (n1) is still saving after step 120"


def test_no_sign_of_life_comes_first() -> None:
    silent = {"time": NOW - 312}
    assert words({}, DATA, silent) == "rank 2 (n2) has given no sign of life for 312 s"
    assert words({}, {**silent, "hung": True}) == ""  # it spoke when it was asked to
    assert words({}, {"ended": True}) == "rank 1 (n1) has ended"
    beats = make_beats({}, {}, {})
    del beats[1]
    assert describe_stalled(beats, 3, NOW) == "rank 1 has given no sign of life"


def test_several_are_told_together() -> None:
    assert words(DATA, {}, DATA, {}) == "ranks 0 (n0), 2 (n2) are still reading data"
    told = words(READ, *[DATA] * 20)
    assert told.startswith("ranks 1 (n1), ") and told.endswith("and 12 more are still reading data")


def test_a_pipeline_names_who_works_not_who_waits_for_it() -> None:
    # Two stages of two ranks; the second data-parallel rank of stage 0 hangs in its forward, and
    # its successor has nothing to do.
    first, stuck, last, starved = {"turns": 10}, {"work": "forward", "turns": 5}, {"turns": 10}, {}
    assert words(first, stuck, last, starved, per_stage=2) == (
        "rank 1 (n1) is still in its forward pass"
    )
    # A stage may be ahead of another one; one rank a stage.
    assert words({"turns": 6}, {"work": "forward", "turns": 3}, per_stage=1).startswith("rank 1 ")
    assert words({"turns": 6}, {"turns": 4}, per_stage=1) == ""


@given(st.lists(st.sampled_from([DATA, READ, FORWARD, {}, {"time": 0.0}]), min_size=1, max_size=6))
def test_never_all_unless_silent_and_never_the_furthest(changes: list[dict[str, Any]]) -> None:
    beats = make_beats(*changes)
    late = stalled_ranks(beats, len(beats), NOW)
    silent = [rank for rank, beat in beats.items() if beat.time == 0]
    if silent:
        assert late == silent
    else:
        # All ranks read data, in the first two turns: who still does comes before the others.
        reading = [rank for rank, beat in beats.items() if beat.turns < 2]
        some_read_no_more = len(reading) < len(beats)
        furthest = max(beat.turns for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.turns < furthest]
        assert late == (reading if reading and some_read_no_more else behind)
