"""Which steps are bad, and after how many of them a run gives up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.config.training_sections import GuardConfig
from hg_scale.exit_codes import GAVE_UP
from hg_scale.training import guard as module
from hg_scale.training.guard import Guard, TooManySkippedSteps, describe_culprits, newest_before
from tests.run_folders import write_checkpoint

LOSSES = st.lists(st.floats(-10, 10) | st.sampled_from([math.nan, math.inf]), max_size=60)
LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}


def make_guard(window: int = 8, sigma: float | None = None, max_skipped: int = 3) -> Guard:
    return Guard(GuardConfig(window=window, spike_sigma=sigma, max_skipped=max_skipped))


def judge_all(guard: Guard, losses: list[float], first: int = 1) -> list[bool]:
    """Whether each step is bad, from step `first` on."""
    bad = []
    for step, loss in enumerate(losses, first):
        bad.append(guard.judge(loss, True) is not None)
        guard.record(step, loss, bad[-1])
    return bad


@given(LOSSES)
def test_without_sigma_only_losses_that_are_not_finite_are_bad(losses: list[float]) -> None:
    assert judge_all(make_guard(), losses) == [not math.isfinite(loss) for loss in losses]


def test_gradients_that_are_not_finite_are_bad() -> None:
    assert make_guard().judge(1.0, False) == "gradients are not finite"
    assert make_guard().judge(1.0, True) is None


@given(LOSSES, st.integers(4, 20), st.floats(0.1, 8))
def test_a_spike_is_judged_by_the_last_good_losses(
    losses: list[float], window: int, sigma: float
) -> None:
    guard, good = make_guard(window, sigma), list[float]()
    for step, loss in enumerate(losses, 1):
        last = good[-window:]
        expected = not math.isfinite(loss)
        threshold = math.inf
        if 2 * len(last) >= window and np.std(last) > 1e-9:
            threshold = float(np.mean(last) + sigma * np.std(last))
            expected = expected or loss > threshold
        bad = guard.judge(loss, True) is not None
        if not math.isclose(loss, threshold, rel_tol=1e-6, abs_tol=1e-6) and (
            len(set(last)) < 2 or np.std(last) > 1e-9
        ):
            assert bad == expected
        guard.record(step, loss, bad)
        if not bad:
            good.append(loss)


def test_the_reason_of_a_spike_states_its_distance() -> None:
    guard = make_guard(8, 6.0)
    judge_all(guard, [3.0, 3.2, 3.0, 3.2])
    assert guard.judge(3.7, True) is None  # 6 sigma above 3.1 is 3.7
    assert guard.judge(9.1, True) == "loss 9.1 is 60.0 sigma above the last 4, 3.1"


def test_equal_losses_define_no_spike() -> None:
    guard = make_guard(4, 3.0)
    assert judge_all(guard, [2.0, 2.0, 2.0, 2.0, 2.1]) == [False] * 5


def test_a_falling_loss_is_no_spike() -> None:
    """With the noise of small batches, at the sigma that docs/bad_steps.md recommends."""
    steps = np.arange(1, 3001)
    noise = np.random.default_rng(0).normal(0, 0.05, steps.size)
    losses = 2 + 9 / steps**0.3 + noise
    assert not any(judge_all(make_guard(128, 6.0), losses.tolist()))


@given(LOSSES, st.integers(0, 60))
def test_a_resumed_run_judges_like_an_uninterrupted_one(losses: list[float], cut: int) -> None:
    uninterrupted, before, after = (make_guard(8, 2.0) for _ in range(3))
    expected = judge_all(uninterrupted, losses)
    bad = judge_all(before, losses[:cut])
    after.load(json.loads(json.dumps(before.state())))
    bad += judge_all(after, losses[cut:], first=min(cut, len(losses)) + 1)
    assert bad == expected and after.state() == uninterrupted.state()


def test_a_checkpoint_without_guard_state_starts_from_scratch() -> None:
    guard = make_guard()
    guard.load({})
    assert guard.state() == {"losses": [], "skipped": []}


@pytest.fixture
def as_reporting_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the rank that reports the error."""

    def stop(error: Exception, reporting_rank: int) -> None:
        raise error

    monkeypatch.setattr(module, "stop_all", stop)


def last_step(guard: Guard, bad: list[int], steps: int, folder: Path) -> int:
    """The step after which the run gives up; `steps` if it does not."""
    for step in range(1, steps + 1):
        guard.record(step, 2.0, step in bad)
        if step in bad:
            try:
                guard.require_progress(step, "why", folder)
            except TooManySkippedSteps:
                return step
    return steps


@pytest.mark.usefixtures("as_reporting_rank")
@pytest.mark.parametrize(
    ("bad", "end"),
    [([2, 3, 4], 40), ([2, 3, 4, 5], 5), ([1, 8, 16, 24, 32], 40), ([2, 4, 6, 9], 9),
     ([2, 4, 6, 10], 40)],
)  # fmt: skip
def test_more_bad_steps_than_allowed_in_the_window_give_up(
    bad: list[int], end: int, tmp_path: Path
) -> None:
    assert last_step(make_guard(8, max_skipped=3), bad, 40, tmp_path) == end


@pytest.mark.usefixtures("as_reporting_rank")
def test_giving_up_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, LAYOUT)
    guard = make_guard(8, max_skipped=1)
    guard.record(22, math.nan, True)
    guard.require_progress(22, "gradients are not finite", checkpoints)
    guard.record(25, math.nan, True)
    with pytest.raises(TooManySkippedSteps) as caught:
        guard.require_progress(25, "gradients are not finite", checkpoints)
    message = str(caught.value)
    good = checkpoints / "step-00000020"
    assert message.startswith(
        "gave up after step 25: 2 of the last 8 steps were skipped, more than guard.max_skipped "
        "= 1; the last: gradients are not finite; the last good checkpoint is "
        f"{good}; start a new run from it (--run NEW --set checkpoint.start_from={good})"
    )
    assert "\n" not in message and caught.value.exit_code == GAVE_UP
    (good / "rank-00000.safetensors").unlink()  # an incomplete checkpoint is not proposed
    assert "step-00000010" in str(caught.value)


def test_giving_up_without_an_older_checkpoint(tmp_path: Path) -> None:
    assert newest_before(tmp_path / "none", 5) is None
    write_checkpoint(tmp_path, 10, LAYOUT)
    assert newest_before(tmp_path / "checkpoints", 10) is None
    assert "no checkpoint is older" in str(
        TooManySkippedSteps("gave up", 10, tmp_path / "checkpoints")
    )


def test_description_of_tensors_that_are_not_finite() -> None:
    weight, many = ["blocks.2.qkv.weight"], [f"w{n}" for n in range(6)]
    assert describe_culprits("a spike", [(2.0, []), (2.1, [])]) == "a spike"
    assert describe_culprits("bad", [(2.0, []), (2.0, weight)]) == (
        "gradients of 1 tensor are not finite: blocks.2.qkv.weight (rank 1)"
    )
    assert describe_culprits("bad", [(2.0, many), (math.nan, many)]) == (
        "the loss is nan on rank 1; gradients of 6 tensors are not finite: w0 (ranks 0, 1), "
        "w1 (ranks 0, 1), w2 (ranks 0, 1), w3 (ranks 0, 1) and 2 more"
    )
