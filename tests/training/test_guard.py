"""What is a bad step, and when there were too many."""

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
from hg_scale.training.guard import GaveUp, Guard, describe_culprits, newest_before
from tests.run_folders import write_checkpoint

LOSSES = st.lists(st.floats(-10, 10) | st.sampled_from([math.nan, math.inf]), max_size=60)
LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}


def make(window: int = 8, sigma: float | None = None, most: int = 3) -> Guard:
    return Guard(GuardConfig(window=window, spike_sigma=sigma, max_skipped=most))


def run(guard: Guard, losses: list[float], first: int = 1) -> list[bool]:
    """Which of these steps are bad."""
    bad = []
    for step, loss in enumerate(losses, first):
        bad.append(guard.judge(loss, True) is not None)
        guard.record(step, loss, bad[-1])
    return bad


@given(LOSSES)
def test_without_a_sigma_only_what_is_not_finite(losses: list[float]) -> None:
    assert run(make(), losses) == [not math.isfinite(loss) for loss in losses]


def test_gradients_that_are_not_finite() -> None:
    assert make().judge(1.0, False) == "gradients are not finite"
    assert make().judge(1.0, True) is None


@given(LOSSES, st.integers(4, 20), st.floats(0.1, 8))
def test_a_spike_is_judged_by_the_last_good_losses(
    losses: list[float], window: int, sigma: float
) -> None:
    guard, good = make(window, sigma), list[float]()
    for step, loss in enumerate(losses, 1):
        last = good[-window:]
        bad = not math.isfinite(loss)
        edge = math.inf
        if 2 * len(last) >= window and np.std(last) > 1e-9:
            edge = float(np.mean(last) + sigma * np.std(last))
            bad = bad or loss > edge
        judged = guard.judge(loss, True) is not None
        if not math.isclose(loss, edge, rel_tol=1e-6, abs_tol=1e-6) and (
            len(set(last)) < 2 or np.std(last) > 1e-9
        ):
            assert judged == bad
        guard.record(step, loss, judged)
        if not judged:
            good.append(loss)


def test_the_line_says_how_far() -> None:
    guard = make(8, 6.0)
    run(guard, [3.0, 3.2, 3.0, 3.2])
    assert guard.judge(3.7, True) is None  # 6 sigma above 3.1 is 3.7
    assert guard.judge(9.1, True) == "loss 9.1 is 60.0 sigma above the last 4, 3.1"


def test_losses_that_are_all_alike_judge_nothing() -> None:
    guard = make(4, 3.0)
    assert run(guard, [2.0, 2.0, 2.0, 2.0, 2.1]) == [False] * 5


def test_a_falling_loss_is_no_spike() -> None:
    """With the noise of small batches, at the sigma that docs/bad_steps.md recommends."""
    steps = np.arange(1, 3001)
    noise = np.random.default_rng(0).normal(0, 0.05, steps.size)
    losses = 2 + 9 / steps**0.3 + noise
    assert not any(run(make(128, 6.0), losses.tolist()))


@given(LOSSES, st.integers(0, 60))
def test_a_resumed_run_judges_as_the_undisturbed_one(losses: list[float], cut: int) -> None:
    whole, before, after = make(8, 2.0), make(8, 2.0), make(8, 2.0)
    expected = run(whole, losses)
    bad = run(before, losses[:cut])
    after.load(json.loads(json.dumps(before.state())))
    bad += run(after, losses[cut:], first=min(cut, len(losses)) + 1)
    assert bad == expected and after.state() == whole.state()


def test_an_older_checkpoint_begins_anew() -> None:
    guard = make()
    guard.load({})
    assert guard.state() == {"losses": [], "skipped": []}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the reporting rank."""

    def stop(fault: Exception, reporting_rank: int) -> None:
        raise fault

    monkeypatch.setattr(module, "stop_all", stop)


def last_allowed(guard: Guard, bad: list[int], upto: int, folder: Path) -> int:
    """The last step before the run gives up."""
    for step in range(1, upto + 1):
        guard.record(step, 2.0, step in bad)
        if step in bad:
            try:
                guard.require_progress(step, "why", folder)
            except GaveUp:
                return step
    return upto


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("bad", "end"),
    [([2, 3, 4], 40), ([2, 3, 4, 5], 5), ([1, 8, 16, 24, 32], 40), ([2, 4, 6, 9], 9),
     ([2, 4, 6, 10], 40)],
)  # fmt: skip
def test_one_more_than_may_be_in_a_window_gives_up(
    bad: list[int], end: int, tmp_path: Path
) -> None:
    assert last_allowed(make(8, most=3), bad, 40, tmp_path) == end


@pytest.mark.usefixtures("alone")
def test_it_names_the_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, LAYOUT)
    guard = make(8, most=1)
    guard.record(22, math.nan, True)
    guard.require_progress(22, "gradients are not finite", checkpoints)
    guard.record(25, math.nan, True)
    with pytest.raises(GaveUp) as caught:
        guard.require_progress(25, "gradients are not finite", checkpoints)
    said = str(caught.value)
    good = checkpoints / "step-00000020"
    assert said.startswith(
        "gave up after step 25: 2 of the last 8 steps were skipped, more than guard.max_skipped "
        "= 1, the last: gradients are not finite; the last good checkpoint is "
        f"{good}; start a new run from it (--run NEW --set checkpoint.start_from={good})"
    )
    assert "\n" not in said and caught.value.exit_code == GAVE_UP
    (good / "rank-00000.safetensors").unlink()  # a damaged one is none to go back to
    assert "step-00000010" in str(caught.value)


def test_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_before(tmp_path / "none", 5) is None
    write_checkpoint(tmp_path, 10, LAYOUT)
    assert newest_before(tmp_path / "checkpoints", 10) is None
    assert "no checkpoint is older" in str(GaveUp("gave up", 10, tmp_path / "checkpoints"))


def test_culprits_in_words() -> None:
    weight, many = ["blocks.2.qkv.weight"], [f"w{n}" for n in range(6)]
    assert describe_culprits("a spike", [(2.0, []), (2.1, [])]) == "a spike"
    assert describe_culprits("bad", [(2.0, []), (2.0, weight)]) == (
        "gradients of 1 tensor are not finite: blocks.2.qkv.weight (rank 1)"
    )
    assert describe_culprits("bad", [(2.0, many), (math.nan, many)]) == (
        "the loss is nan on rank 1; gradients of 6 tensors are not finite: w0 (ranks 0, 1), "
        "w1 (ranks 0, 1), w2 (ranks 0, 1), w3 (ranks 0, 1) and 2 more"
    )
