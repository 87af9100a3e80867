"""Scoring of a text: losses, bits per byte and their confidence interval."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from hg_scale.commands.evaluate import position_edges
from hg_scale.config.schema import ModelConfig
from hg_scale.data.protocol import SlidingWindows, Tokens
from hg_scale.evaluation.scoring import MIN_BATCHES, Losses, Score, score_windows, student_95
from hg_scale.model.hourglass import Hourglass

TEXT = (b"the quick brown fox jumps over the lazy dog. " * 60)[1000:1700]
TOKENS = Tokens(np.frombuffer(TEXT, np.uint8))


@pytest.fixture(scope="module")
def model() -> Hourglass:
    config = ModelConfig(
        hierarchy="1@1 1@2 1@1", d_model=32, heads=2, d_ff=64, sequence_length=64, window=[8, None],
        pooling="average", upsampling="linear", positions="rotary",
    )  # fmt: skip
    return Hourglass(config)


def score(model: Hourglass, protocol: SlidingWindows, **options: int) -> Score:
    return Score(score_windows(model, TOKENS, len(TEXT), protocol, **options), len(TEXT))


def test_uniform_model_scores_8_bits_per_byte(model: Hourglass) -> None:
    uniform = Hourglass(model.config)
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.weight"))
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.bias"))
    for protocol in (SlidingWindows(64, 64), SlidingWindows(64, 16)):
        found = score(uniform, protocol)
        assert found.bits_per_byte == pytest.approx(8, rel=1e-7)
        assert (found.tokens, found.bytes) == (700, 700)
        assert found.byte_interval == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("protocol", [SlidingWindows(64, 64), SlidingWindows(64, 24)])
def test_score_does_not_depend_on_the_batch_size(
    model: Hourglass, protocol: SlidingWindows
) -> None:
    scores = [score(model, protocol, batch_size=size).nats for size in (1, 3, 16)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("protocol", [SlidingWindows(64, 64), SlidingWindows(64, 24)])
def test_ranges_of_windows_add_up(model: Hourglass, protocol: SlidingWindows) -> None:
    expected = score(model, protocol).losses
    count = protocol.count(len(TEXT))
    ends = [0, 1, count // 2, count]
    parts = [
        score_windows(model, TOKENS, len(TEXT), protocol, first=a, last=b)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    joined = Losses.joined(parts)
    np.testing.assert_allclose(joined.nats, expected.nats, rtol=1e-6)
    np.testing.assert_allclose(joined.position_nats, expected.position_nats, rtol=1e-5)


@pytest.mark.parametrize("stride", [64, 24, 1])
def test_losses_equal_those_of_a_plain_loop(model: Hourglass, stride: int) -> None:
    """Every token once, predicted within its window; the last window is shorter."""
    ids, nats = torch.tensor([0, *TEXT]), []
    with torch.no_grad():
        scored = 0
        while scored < 700:
            start = 0 if scored == 0 else scored + stride - 64
            stop = min(700, 64 if scored == 0 else scored + stride)
            logits = model(ids[None, start:stop])[0].double()
            losses = torch.nn.functional.cross_entropy(
                logits, ids[start + 1 : stop + 1], reduction="none"
            )
            nats += losses[scored - start :].tolist()
            scored = stop
    counted: list[int] = []
    found = score_windows(
        model, TOKENS, 700, SlidingWindows(64, stride), batch_size=4, advance=counted.append
    )
    assert len(nats) == sum(counted) == int(found.tokens.sum()) == 700
    assert found.nats.sum() == pytest.approx(sum(nats), rel=1e-6)
    # By position: all of the first window is scored, and the end of later ones.
    assert found.position_tokens[0] == (1 if stride < 64 else 11)
    assert found.position_nats.sum() == pytest.approx(sum(nats), rel=1e-6)


@pytest.mark.parametrize("stride", [64, 24])
def test_separate_windows_begin_with_the_start_token(model: Hourglass, stride: int) -> None:
    """As in the authors' code, which shifts the ids of every window by one and fills in a 0."""
    protocol, nats = SlidingWindows(64, stride), 0.0
    for number in range(protocol.count(700)):
        start, stop, first_scored = protocol.window(number, 700)
        ids = torch.tensor([0, *TEXT[start:stop]])
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nats += float(losses[first_scored - start :].sum())
    found = score(model, protocol, separate=True)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert abs(found.nats - score(model, protocol).nats) > 1e-3


def test_window_longer_than_the_text_changes_nothing(model: Hourglass) -> None:
    """Nor does it cost memory or time."""
    found, expected = (
        score(model, SlidingWindows(10**6, 10**6)),
        score(model, SlidingWindows(700, 700)),
    )
    assert found.nats == expected.nats
    assert found.losses.position_tokens.sum() == 700


def test_losses_by_position_and_phase() -> None:
    """Positions 0..5 of two windows, losses equal to the position; the last token not scored."""
    positions, counts = np.arange(6.0) * 2, np.array([2, 2, 2, 2, 2, 1])
    positions[5] = 5
    tokens = np.array([6, 5])
    losses = Losses(np.array([15.0, 10.0]), tokens, tokens, positions, counts)
    found = Score(losses, 11)
    assert found.by_position([0, 1, 2, 4, 6]) == [
        (0, 1, 0, 2), (1, 2, 1, 2), (2, 4, 2.5, 4), (4, 6, 13 / 3, 3),
    ]  # fmt: skip
    assert found.by_phase(2) == [(2.0, 6), (13 / 5, 5)]
    assert found.bits_per_token == pytest.approx(25 / 11 / log(2))


def score_of_windows(nats: np.ndarray, tokens: np.ndarray, size: np.ndarray) -> Score:
    one = np.zeros(1)
    return Score(Losses(nats, tokens, size, one, one.astype(int)), int(size.sum()))


@pytest.mark.parametrize(("windows", "correlated"), [(10, 1), (40, 1), (300, 4), (1000, 4)])
def test_the_interval_covers_the_mean_of_the_source(windows: int, correlated: int) -> None:
    """About 95% of the intervals of 1,000 texts with a known mean loss contain it.

    Also of few windows, and where each is correlated with the `correlated` - 1 before it.
    """
    draw, covered = np.random.default_rng(0), 0
    size = np.full(windows, 10)
    for _ in range(1000):
        noise = draw.normal(size=windows + correlated - 1)
        nats = 50 + sum(noise[i : i + windows] for i in range(correlated))
        found = score_of_windows(nats, size, size)
        covered += abs(found.nats_per_token - 5) <= found.byte_interval * found.nats_per_token
    assert 930 <= covered <= 970


def test_few_windows_give_no_interval() -> None:
    nats = np.arange(50.0, 50 + MIN_BATCHES - 1)
    size = np.full(MIN_BATCHES - 1, 10)
    assert np.isnan(score_of_windows(nats, size, size).byte_interval)


def test_interval_is_that_of_bits_per_byte_not_of_nats_per_token() -> None:
    """Nats proportional to bytes leave no uncertainty in bits per byte, only per token."""
    size = np.random.default_rng(0).integers(20, 60, 400)
    found = score_of_windows(2.0 * size, np.full(400, 10), size)
    assert found.byte_interval == pytest.approx(0, abs=1e-12)
    found = score_of_windows(2.0 * size, size, np.full(400, 10))
    assert found.byte_interval > 0.01


def test_scored_end_of_sliding_windows_is_a_range_of_its_own() -> None:
    assert position_edges(SlidingWindows(20, 20)) == [0, 1, 2, 4, 8, 16, 20]
    assert position_edges(SlidingWindows(20, 6)) == [0, 1, 2, 4, 8, 14, 20]
    assert position_edges(SlidingWindows(4096, 128))[-3:] == [2048, 3968, 4096]
    assert position_edges(SlidingWindows(2, 1)) == [0, 1, 2] and position_edges(
        SlidingWindows(1, 1)
    ) == [0, 1]


def test_student_95_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    found = [student_95(freedom) for freedom in range(MIN_BATCHES - 1, 200)]
    np.testing.assert_allclose(
        found, stats.t.ppf(0.975, np.arange(MIN_BATCHES - 1, 200)), atol=5e-4
    )
