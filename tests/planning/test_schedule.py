"""The simulated 1F1B schedule: closed forms, bounds, and DeepSpeed's own instruction lists."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.planning.schedule import simulate_1f1b

Times = tuple[list[int], list[int], list[int], int]
MESSAGES = {  # instruction -> (kind of tensor, distance to the other stage)
    "SendActivation": ("activation", 1),
    "RecvActivation": ("activation", -1),
    "SendGrad": ("gradient", -1),
    "RecvGrad": ("gradient", 1),
}


@st.composite
def stage_times(draw: st.DrawFn) -> Times:
    """Whole seconds, so that sums are exact; many ties."""
    stages = draw(st.integers(1, 7))
    numbers = st.integers(0, 12)
    forward, backward, transfer = (
        draw(st.lists(numbers, min_size=n, max_size=n)) for n in (stages, stages, stages - 1)
    )
    return forward, backward, transfer, draw(st.integers(1, 40))


def walk_instructions(
    forward: Sequence[float], backward: Sequence[float], transfer: Sequence[float], count: int
) -> float:
    """Execute DeepSpeed's instruction lists: each stage its own, a transfer when both are at it."""
    stages = len(forward)
    queues = [
        deque(
            instruction.name
            for step in deepspeed_schedule.TrainSchedule(count, stages, stage)
            for instruction in step
        )
        for stage in range(stages)
    ]
    clocks, passes = [0.0] * stages, defaultdict(int)
    while any(queues):
        progressed = False
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            name = queue[0]
            if name in MESSAGES:
                kind, distance = MESSAGES[name]
                other = stage + distance
                partner = f"{'Recv' if name.startswith('Send') else 'Send'}{name[4:]}"
                if not queues[other] or queues[other][0] != partner:
                    continue
                queues[other].popleft()
                met = max(clocks[stage], clocks[other]) + transfer[min(stage, other)]
                clocks[stage] = clocks[other] = met
                passes[kind] += 1
            elif name in ("ForwardPass", "BackwardPass"):
                clocks[stage] += (forward if name == "ForwardPass" else backward)[stage]
                passes[name] += 1
            queue.popleft()
            progressed = True
        assert progressed, f"deadlock at {[queue[0] for queue in queues if queue]}"
    assert passes["ForwardPass"] == passes["BackwardPass"] == count * stages
    assert passes["activation"] == passes["gradient"] == count * (stages - 1)
    return max(clocks)


@settings(deadline=None, max_examples=200)
@given(stage_times())
def test_equals_the_instruction_lists_of_deepspeed(times: Times) -> None:
    assert simulate_1f1b(*times).seconds == walk_instructions(*times)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(50, 200), st.randoms(use_true_random=False))
def test_many_micro_batches_and_times_that_round(stages: int, count: int, random: object) -> None:
    """Rounds that repeat are added up, not simulated."""
    forward, backward, transfer = (
        [random.uniform(0.1, 1) for _ in range(n)]  # type: ignore[attr-defined]
        for n in (stages, stages, stages - 1)
    )
    expected = walk_instructions(forward, backward, transfer, count)
    assert simulate_1f1b(forward, backward, transfer, count).seconds == pytest.approx(
        expected, rel=1e-9
    )


@given(st.integers(1, 12), st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
def test_equal_stages_have_the_textbook_time(stages: int, count: int, f: int, b: int) -> None:
    """(m + p - 1) (f + b), with a bubble of (p - 1) / (m + p - 1)."""
    schedule = simulate_1f1b([f] * stages, [b] * stages, [0] * (stages - 1), count)
    assert schedule.seconds == (count + stages - 1) * (f + b)
    if f + b:
        assert schedule.bubble == pytest.approx((stages - 1) / (count + stages - 1))


@given(stage_times())
def test_never_faster_than_the_busiest_stage(times: Times) -> None:
    schedule = simulate_1f1b(*times)
    forward, backward, transfer, count = times
    crossing = [*transfer, 0]
    for s, (busy, moving) in enumerate(zip(schedule.busy, schedule.transferring, strict=True)):
        assert busy == count * (forward[s] + backward[s])
        assert moving == 2 * count * (crossing[s] + (crossing[s - 1] if s else 0))
        assert schedule.seconds >= busy + moving
    assert schedule.seconds >= sum(forward) + sum(backward) + 2 * sum(transfer)
    assert 0 <= schedule.bubble < 1


@given(stage_times(), st.integers(0, 2), st.integers(0, 6), st.integers(1, 5))
def test_no_time_can_grow_and_make_the_step_faster(
    times: Times, which: int, where: int, more: int
) -> None:
    forward, backward, transfer, count = times
    before = simulate_1f1b(*times).seconds
    assert simulate_1f1b(forward, backward, transfer, count + 1).seconds >= before
    grown = (forward, backward, transfer)[which]
    if grown:
        grown[where % len(grown)] += more
        assert simulate_1f1b(forward, backward, transfer, count).seconds >= before


def test_slow_stage_and_blocking_transfers_by_hand() -> None:
    """Two stages: each micro-batch costs the pair one exchange both ways, then the slower stage."""
    # Stage 0: F0 ends at 1; its transfer at 2; F1 at 3. Stage 1: F0 ends at 5, B0 at 11. Both meet
    # at 11; the gradient arrives at 12, activation 1 at 13. Stage 0 ends B0 at 15; stage 1 F1 at
    # 16, B1 at 22, its gradient arrives at 23, and stage 0 ends B1 at 25.
    schedule = simulate_1f1b([1, 3], [2, 6], [1], 2)
    assert schedule.seconds == 25
    assert schedule.busy == (6, 18)
    assert schedule.transferring == (4, 4)
    assert schedule.bubble == pytest.approx(1 - (6 + 18 + 4 + 4) / 50)


def test_thousands_of_micro_batches_take_no_longer_than_a_hundred() -> None:
    """Steady rounds are not simulated one by one."""
    stages = 64
    times = [1 + 0.01 * s for s in range(stages)]
    start = time.process_time()
    schedule = simulate_1f1b(times, [2 * t for t in times], [0.1] * (stages - 1), 100_000)
    assert time.process_time() - start < 1
    # Every round waits for stage 62, 1.62 + 3.24, with transfers both ways over two boundaries; the
    # last stage takes 1.63 + 3.26, but has one boundary.
    assert schedule.seconds / 100_000 == pytest.approx(4.86 + 0.4, rel=1e-3)


@pytest.mark.parametrize(
    "times", [([], [], [], 1), ([1], [1, 2], [], 1), ([1], [1], [1], 1), ([1], [1], [], 0)]
)
def test_times_that_do_not_match_are_refused(times: Times) -> None:
    with pytest.raises(ValueError, match="expected times of p stages, p - 1 boundaries"):
        simulate_1f1b(*times)
