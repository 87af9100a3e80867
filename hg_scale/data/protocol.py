"""Evaluation protocols: the windows in which a text is scored, and the tokens that each one scores.

Every token is scored exactly once. Without context (paper, section 3.3, and validation in training)
windows follow each other; sliding windows overlap, so that each token has more context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hg_scale.config.constants import IGNORED_LABEL

FirstToken = Literal["previous", "zero"]
"""First input of a window: the token before it, or id 0 (the authors' code)."""


class EvaluationWindow(NamedTuple):
    """Tokens [start, stop) of one forward pass, of which those from `first_scored` on count."""

    start: int
    stop: int
    first_scored: int


@dataclass(frozen=True)
class SlidingWindows:
    """Windows of `length` tokens, each `stride` tokens after the previous one.

    The first `length - stride` tokens of a window are context, scored by windows before; the first
    window has no context. `stride == length`: no overlap. The paper slides 4,096 by 128.
    """

    length: int
    stride: int

    def count(self, tokens: int) -> int:
        """Return the number of windows of a text of `tokens`."""
        return 1 + max(0, -(-(tokens - self.length) // self.stride)) if tokens else 0

    def window(self, number: int, tokens: int) -> EvaluationWindow:
        """Return window `number`, from 0, of a text of `tokens`."""
        start = number * self.stride
        stop = min(start + self.length, tokens)
        context = self.length - self.stride if number else 0
        return EvaluationWindow(start, stop, start + context)


class TokenSequence(Protocol):
    """Readable tokens: `data/shards.py`'s SplitReader, or `Tokens` in memory."""

    def read(self, start: int, stop: int) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class Tokens:
    """A token sequence held in memory."""

    ids: NDArray[np.integer]

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        return self.ids[start:stop]


def window_batches(
    text: TokenSequence,
    tokens: int,
    windows: SlidingWindows,
    *,
    batch_size: int,
    start_token: int,
    separate: bool,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (inputs, labels) of windows `first` to `last`: int64 (up to batch_size, n) each.

    n is the length of the longest window in the batch, at most `windows.length`. An input is the
    token before its label; before the first token of the text it is `start_token`, and with
    `separate` (windows are documents, as images are, or see no token before them) before that of
    every window. Labels that are not scored are IGNORED_LABEL.
    """
    last = windows.count(tokens) if last is None else last
    for number in range(first, last, batch_size):
        batch = [windows.window(n, tokens) for n in range(number, min(number + batch_size, last))]
        start, stop = max(0, batch[0].start - 1), batch[-1].stop
        ids = np.empty(stop - start + 1, np.int64)  # token i is ids[i - start + 1]
        ids[0], ids[1:] = start_token, text.read(start, stop)
        longest = max(window.stop - window.start for window in batch)
        inputs = np.full((len(batch), longest), start_token, np.int64)
        labels = np.full((len(batch), longest), IGNORED_LABEL, np.int64)
        for i, window in enumerate(batch):
            n, offset = window.stop - window.start, window.start - start + 1
            inputs[i, :n] = ids[offset - 1 : offset - 1 + n]
            if separate:
                inputs[i, 0] = start_token
            context = window.first_scored - window.start
            labels[i, context:n] = ids[offset + context : offset + n]
        yield inputs, labels
