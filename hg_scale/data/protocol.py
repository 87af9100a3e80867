"""How a text is scored: which windows go through the model, and which of their tokens count.

Every token counts exactly once. Without context (paper, section 3.3, and training's validation)
windows follow each other; sliding ones overlap, so that each token is guessed from more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hg_scale.config.constants import IGNORED_LABEL


class ScoredWindow(NamedTuple):
    """Tokens [start, stop) are guessed together; those from `scored` on count."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class WindowProtocol:
    """Windows of `length` tokens, each `stride` after the one before.

    A window's first `length - stride` tokens were scored by those before and are context only; the
    first window is scored whole. `stride == length`: no context. The paper slides 4,096 by 128.
    """

    length: int
    stride: int

    def count(self, tokens: int) -> int:
        """Windows of a text."""
        return 1 + max(0, -(-(tokens - self.length) // self.stride)) if tokens else 0

    def window(self, number: int, tokens: int) -> ScoredWindow:
        """The `number`-th window of a text of `tokens`, from 0."""
        start = number * self.stride
        stop = min(start + self.length, tokens)
        return ScoredWindow(start, stop, start + (self.length - self.stride if number else 0))


class TokenText(Protocol):
    """Tokens to be read: `data/shards.py`'s SplitReader, or `Tokens`."""

    def read(self, start: int, stop: int) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class Tokens:
    """A text held in memory."""

    ids: NDArray[np.integer]

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        return self.ids[start:stop]


def batches(
    text: TokenText,
    tokens: int,
    how: WindowProtocol,
    *,
    rows: int,
    begin: int,
    separate: bool,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(inputs, labels), int64 (up to `rows`, n) each, of the windows from `first` to `last`.

    n is the length of the longest of the windows: less than `how.length` where the text is. An
    input is the token before its label; at the beginning of the text, and of every window where
    each is a document of its own (`separate`, images), it is the token `begin`. Labels that do not
    count are IGNORED_LABEL.
    """
    last = how.count(tokens) if last is None else last
    for number in range(first, last, rows):
        windows = [how.window(n, tokens) for n in range(number, min(number + rows, last))]
        start, stop = max(0, windows[0].start - 1), windows[-1].stop
        ids = np.empty(stop - start + 1, np.int64)  # token i at ids[i - start + 1]
        ids[0], ids[1:] = begin, text.read(start, stop)
        longest = max(window.stop - window.start for window in windows)
        inputs = np.full((len(windows), longest), begin, np.int64)
        labels = np.full((len(windows), longest), IGNORED_LABEL, np.int64)
        for row, window in enumerate(windows):
            n, place = window.stop - window.start, window.start - start + 1
            inputs[row, :n] = ids[place - 1 : place - 1 + n]
            if separate:
                inputs[row, 0] = begin
            context = window.scored - window.start
            labels[row, context:n] = ids[place + context : place + n]
        yield inputs, labels
