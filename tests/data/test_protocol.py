"""Which windows score a text: every token once, from the context that the protocol promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.protocol import Tokens, WindowProtocol, batches

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda p: (max(p), min(p)))


@given(SIZES, st.integers(0, 200))
def test_every_token_is_scored_once(sizes: tuple[int, int], tokens: int) -> None:
    how = WindowProtocol(*sizes)
    scored = []
    for number in range(how.count(tokens)):
        window = how.window(number, tokens)
        assert window.start <= window.scored < window.stop <= window.start + how.length
        scored += range(window.scored, window.stop)
    assert scored == list(range(tokens))


@given(SIZES, st.integers(1, 200), st.integers(1, 5), st.data())
def test_batches_hold_the_text(
    sizes: tuple[int, int], tokens: int, rows: int, data: st.DataObject
) -> None:
    how, ids = WindowProtocol(*sizes), np.arange(7, 7 + tokens)
    cut = data.draw(st.integers(0, how.count(tokens)))  # the windows are shared out
    found = []
    for first, last in ((0, cut), (cut, None)):
        for inputs, labels in batches(
            Tokens(ids), tokens, how, rows=rows, begin=3, separate=False, first=first, last=last
        ):
            counted = labels >= 0
            found += labels[counted].tolist()
            # The token before, or the beginning; inside a window each input is the label before.
            before = np.where(labels[counted] == 7, 3, labels[counted] - 1)
            assert (inputs[counted] == before).all()
    assert found == ids.tolist()


@pytest.mark.parametrize(("tokens", "widths"), [(7, [7]), (100, [50, 50]), (101, [50, 50, 1])])
def test_nothing_is_padded_beyond_the_longest_window(tokens: int, widths: list[int]) -> None:
    how = WindowProtocol(50, 50)
    found = batches(Tokens(np.arange(tokens)), tokens, how, rows=1, begin=0, separate=False)
    assert [inputs.shape for inputs, _ in found] == [(1, width) for width in widths]
    (both,) = batches(Tokens(np.arange(60)), 60, how, rows=2, begin=0, separate=False)
    assert both[0].shape == both[1].shape == (2, 50)


def test_the_papers_protocol_gives_every_token_its_context() -> None:
    how = WindowProtocol(4096, 128)
    assert how.window(0, 10_000) == (0, 4096, 0)
    assert how.window(1, 10_000) == (128, 4224, 4096)
    assert how.window(46, 10_000) == (5888, 9984, 9856)
    assert how.window(47, 10_000) == (6016, 10_000, 9984)
    assert how.count(10_000) == 48


@pytest.mark.parametrize("rows", [1, 4])
def test_documents_of_one_window_do_not_see_each_other(rows: int) -> None:
    ids = np.arange(12)
    rest = np.concatenate(
        [
            inputs
            for inputs, _ in batches(
                Tokens(ids), 12, WindowProtocol(4, 4), rows=rows, begin=99, separate=True
            )
        ]
    )
    assert rest.tolist() == [[99, 0, 1, 2], [99, 4, 5, 6], [99, 8, 9, 10]]
