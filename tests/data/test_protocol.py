"""Evaluation windows: every token is scored once, with the context of the protocol."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.protocol import SlidingWindows, Tokens, window_batches

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda p: (max(p), min(p)))


@given(SIZES, st.integers(0, 200))
def test_every_token_is_scored_once(sizes: tuple[int, int], tokens: int) -> None:
    windows = SlidingWindows(*sizes)
    scored = []
    for number in range(windows.count(tokens)):
        window = windows.window(number, tokens)
        assert window.start <= window.first_scored < window.stop <= window.start + windows.length
        scored += range(window.first_scored, window.stop)
    assert scored == list(range(tokens))


@given(SIZES, st.integers(1, 200), st.integers(1, 5), st.data())
def test_batches_hold_the_text(
    sizes: tuple[int, int], tokens: int, batch_size: int, data: st.DataObject
) -> None:
    windows, ids = SlidingWindows(*sizes), np.arange(7, 7 + tokens)
    middle = data.draw(st.integers(0, windows.count(tokens)))  # two ranges, as of two ranks
    found = []
    for first, last in ((0, middle), (middle, None)):
        for inputs, labels in window_batches(
            Tokens(ids),
            tokens,
            windows,
            batch_size=batch_size,
            start_token=3,
            separate=False,
            first=first,
            last=last,
        ):
            counted = labels >= 0
            found += labels[counted].tolist()
            # An input is the token before its label, or the start token.
            before = np.where(labels[counted] == 7, 3, labels[counted] - 1)
            assert (inputs[counted] == before).all()
    assert found == ids.tolist()


@pytest.mark.parametrize(("tokens", "widths"), [(7, [7]), (100, [50, 50]), (101, [50, 50, 1])])
def test_batches_are_as_wide_as_their_longest_window(tokens: int, widths: list[int]) -> None:
    windows = SlidingWindows(50, 50)
    found = window_batches(
        Tokens(np.arange(tokens)), tokens, windows, batch_size=1, start_token=0, separate=False
    )
    assert [inputs.shape for inputs, _ in found] == [(1, width) for width in widths]
    (both,) = window_batches(
        Tokens(np.arange(60)), 60, windows, batch_size=2, start_token=0, separate=False
    )
    assert both[0].shape == both[1].shape == (2, 50)


def test_sliding_windows_of_the_paper() -> None:
    windows = SlidingWindows(4096, 128)
    assert windows.window(0, 10_000) == (0, 4096, 0)
    assert windows.window(1, 10_000) == (128, 4224, 4096)
    assert windows.window(46, 10_000) == (5888, 9984, 9856)
    assert windows.window(47, 10_000) == (6016, 10_000, 9984)
    assert windows.count(10_000) == 48


@pytest.mark.parametrize("batch_size", [1, 4])
def test_separate_windows_do_not_see_each_other(batch_size: int) -> None:
    windows = SlidingWindows(4, 4)
    batches = window_batches(
        Tokens(np.arange(12)), 12, windows, batch_size=batch_size, start_token=99, separate=True
    )
    found = np.concatenate([inputs for inputs, _ in batches])
    assert found.tolist() == [[99, 0, 1, 2], [99, 4, 5, 6], [99, 8, 9, 10]]
