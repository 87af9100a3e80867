"""Learning rates of all schedules at chosen steps."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi, sqrt

import pytest

from hg_scale.training.schedule import LearningRateSchedule


@pytest.mark.parametrize("kind", ["cosine", "rsqrt", "wsd"])
def test_warm_up_is_linear_from_zero_to_the_peak(kind):
    schedule = LearningRateSchedule(kind, peak=8e-4, total_steps=100, warmup_steps=8, decay_steps=0)
    # The cosine starts at the end of the warm-up.
    assert [schedule(step) for step in (1, 2, 4, 8)] == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4])


@pytest.mark.parametrize("kind", ["cosine", "rsqrt", "wsd"])
def test_without_a_warm_up_the_first_step_has_the_peak(kind):
    assert LearningRateSchedule(kind, peak=1.0, total_steps=10**9)(1) == pytest.approx(1.0)


def test_cosine_of_the_paper_counts_after_the_warm_up_and_ends_above_zero():
    # enwik8: peak 4e-4, 4k steps of warm-up, a cycle of 200k steps.
    schedule = LearningRateSchedule("cosine", peak=4e-4, total_steps=200_000, warmup_steps=4_000)
    assert schedule(4_000) == 4e-4
    assert schedule(104_000) == pytest.approx(2e-4)
    assert schedule(200_000) == pytest.approx(4e-4 * 0.5 * (1 + cos(pi * 0.98)))
    assert schedule(200_000) > 0


def test_cosine_with_its_own_cycle_ends_at_the_minimum_and_stays():
    schedule = LearningRateSchedule(
        "cosine", peak=1.0, total_steps=100, warmup_steps=20, cycle_steps=60, minimum_ratio=0.1
    )
    assert [schedule(s) for s in (20, 50, 80, 90, 100)] == pytest.approx([1, 0.55, 0.1, 0.1, 0.1])


def test_rsqrt_of_imagenet32_then_a_cosine_to_zero():
    peak = 0.0442 / sqrt(8_000)
    schedule = LearningRateSchedule(
        "rsqrt", peak=peak, total_steps=470_000, warmup_steps=8_000, decay_steps=70_000
    )
    assert schedule(8_000) == pytest.approx(4.94e-4, rel=1e-3)
    assert schedule(32_000) == pytest.approx(peak / 2)
    assert schedule(400_000) == pytest.approx(0.0442 / sqrt(400_000))
    assert schedule(435_000) == pytest.approx(0.0442 / sqrt(400_000) / 2)
    assert schedule(470_000) == pytest.approx(0.0)


def test_rsqrt_without_a_decay_is_clipped_at_the_minimum():
    schedule = LearningRateSchedule(
        "rsqrt", peak=1.0, total_steps=1000, warmup_steps=10, minimum_ratio=0.25
    )
    assert [schedule(s) for s in (40, 90, 160, 1000)] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [1, 0.75, 0.5, 0]), ("sqrt", [1, 0.5, 1 - sqrt(0.5), 0])]
)
def test_wsd_is_stable_and_then_decays(shape, expected):
    schedule = LearningRateSchedule(
        "wsd", peak=1.0, total_steps=100, warmup_steps=10, decay_steps=20, decay_shape=shape
    )
    assert [schedule(step) for step in (10, 50, 79)] == [1, 1, 1]
    assert [schedule(step) for step in (80, 85, 90, 100)] == pytest.approx(expected)


def test_wsd_ends_at_the_minimum():
    schedule = LearningRateSchedule(
        "wsd", peak=2.0, total_steps=10, decay_steps=4, minimum_ratio=0.1
    )
    assert [schedule(step) for step in (6, 8, 10, 99)] == pytest.approx([2.0, 1.1, 0.2, 0.2])


def test_wsd_before_its_decay_does_not_depend_on_the_last_step():
    """So that a decay can start from any checkpoint of the stable phase."""
    long = LearningRateSchedule("wsd", peak=1.0, total_steps=1000, warmup_steps=10, decay_steps=100)
    branch = replace(long, total_steps=450, decay_steps=50)
    assert all(branch(step) == long(step) for step in range(1, 401))
    assert [branch(step) for step in (425, 450)] == pytest.approx([0.5, 0.0])
    assert long(450) == 1.0


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="'step' is not one of"):
        LearningRateSchedule("step", peak=1.0, total_steps=10)(1)  # type: ignore[arg-type]
