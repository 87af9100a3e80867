"""The simulated pipeline step, against DeepSpeed's own schedule and closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.parallel.pipeline_schedule import Action, simulate_step, stage_actions

TIMES = st.integers(1, 9)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Draw forward, backward and transfer times and a number of micro-batches."""
    stages = draw(st.integers(1, 6))
    passes = [draw(st.lists(TIMES, min_size=stages, max_size=stages)) for _ in range(2)]
    transfer = draw(st.lists(st.integers(0, 5), min_size=stages - 1, max_size=stages - 1))
    return *passes, transfer, draw(st.integers(1, 9))  # type: ignore[return-value]


def deepspeeds_actions(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Translate the instructions of TrainSchedule, whose buffers are named by their micro-batch."""
    from deepspeed.runtime.pipe import schedule

    class Named(schedule.TrainSchedule):
        def _buffer_idx(self, micro_batch_id: int) -> int:
            return micro_batch_id

    kinds = {
        schedule.ForwardPass: ("forward", stage), schedule.BackwardPass: ("backward", stage),
        schedule.SendActivation: ("activations", stage),
        schedule.RecvActivation: ("activations", stage - 1),
        schedule.SendGrad: ("gradients", stage - 1), schedule.RecvGrad: ("gradients", stage),
    }  # fmt: skip
    return [
        Action(*kinds[type(command)], command.buffer_id)
        for tick in Named(micro_batches, stages, stage).steps()
        for command in tick
        if type(command) in kinds
    ]


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_actions_are_those_of_deepspeed(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        expected = deepspeeds_actions(stage, stages, micro_batches)
        assert list(stage_actions(stage, stages, micro_batches)) == expected


@given(
    stages=st.integers(1, 6), micro_batches=st.integers(1, 9), forward=TIMES, backward=TIMES,
)  # fmt: skip
def test_equal_stages_have_the_bubble_of_the_closed_form(
    stages: int, micro_batches: int, forward: int, backward: int
) -> None:
    step = simulate_step([forward] * stages, [backward] * stages, [0] * (stages - 1), micro_batches)
    assert step.seconds == (micro_batches + stages - 1) * (forward + backward)
    assert step.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@settings(max_examples=200)
@given(pipelines(), st.integers(0, 5), st.integers(0, 2))
def test_a_slower_part_never_makes_a_step_faster(
    pipeline: tuple[list[int], list[int], list[int], int], place: int, part: int
) -> None:
    forward, backward, transfer, micro_batches = pipeline
    before = simulate_step(forward, backward, transfer, micro_batches)
    times = (forward, backward, transfer)[part]
    if times:
        times[place % len(times)] += 1
    after = simulate_step(forward, backward, transfer, micro_batches)
    assert after.seconds >= before.seconds
    assert before.seconds >= max(before.busy)


def test_one_micro_batch_passes_all_stages_and_boundaries_in_turn() -> None:
    step = simulate_step([1, 2, 3], [4, 5, 6], [10, 20], 1)
    assert step.seconds == 1 + 10 + 2 + 20 + 3 + 6 + 20 + 5 + 10 + 4


def test_a_slow_stage_sets_the_pace() -> None:
    """Two stages, the second slow: it works without a break from its first pass to its last."""
    step = simulate_step([1, 4], [2, 8], [0], 10)
    assert step.seconds == 1 + 10 * 12 + 2
    assert step.busy == (30, 120)
    assert step.bubble == pytest.approx(1 - 150 / 246)
