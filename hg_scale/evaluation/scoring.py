"""Losses of a model on a text, every token scored once, and the figures derived from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from hg_scale.data.protocol import (
    FirstToken,
    SlidingWindows,
    Tokens,
    TokenSequence,
    window_batches,
)
from hg_scale.data.tokenizer import Tokenizer
from hg_scale.model.hourglass import Hourglass

BATCHES = 30  # consecutive parts of the text (batch means) whose spread gives the interval
MIN_BATCHES = 10  # with fewer the interval would be too uncertain
_NORMAL_95 = 1.95996  # 97.5% quantile of the normal distribution


def student_95(degrees: int) -> float:
    """The 97.5% quantile of Student's t, to 3 decimals for 9 or more degrees of freedom."""
    z = _NORMAL_95  # Cornish-Fisher expansion in 1 / degrees
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Losses:
    """Sums of losses in nats (fp64), with the number of tokens and bytes in each sum.

    Per window, in the order of the text: `nats`, `tokens`, `bytes`, each (N,). Per position in the
    window: `position_nats`, `position_tokens`, each (L,).
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    position_nats: NDArray[np.float64]
    position_tokens: NDArray[np.int64]

    @staticmethod
    def joined(parts: list[Losses]) -> Losses:
        """Join the losses of consecutive ranges of windows."""
        return Losses(
            np.concatenate([p.nats for p in parts]),
            np.concatenate([p.tokens for p in parts]),
            np.concatenate([p.bytes for p in parts]),
            np.sum([p.position_nats for p in parts], 0),
            np.sum([p.position_tokens for p in parts], 0),
        )


@dataclass(frozen=True)
class Score:
    """Mean losses of a text of `bytes` bytes, in the usual units."""

    losses: Losses
    bytes: int

    @cached_property
    def nats(self) -> float:
        """Sum of the losses of all tokens."""
        return float(self.losses.nats.sum())

    @cached_property
    def tokens(self) -> int:
        """Number of tokens scored."""
        return int(self.losses.tokens.sum())

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.bytes

    @property
    def byte_interval(self) -> float:
        """Half width of a 95% confidence interval of bits per byte, as a fraction of it.

        The interval is for the mean over endless text of this kind. It comes from the spread of up
        to 30 consecutive parts of the text (batch means), since the losses of neighbouring windows
        are correlated. NaN for fewer than MIN_BATCHES windows.
        """
        sizes = self.losses.bytes
        parts = min(BATCHES, len(sizes))
        if parts < MIN_BATCHES:
            return float("nan")
        nats, size = (
            np.array([part.sum() for part in np.array_split(values, parts)])
            for values in (self.losses.nats, sizes)
        )
        # Bits per byte is a ratio of sums, so its variance is that of the residuals.
        residuals = nats - self.nats * size / size.sum()
        spread = sqrt((residuals**2).sum() * parts / (parts - 1))
        return student_95(parts - 1) * spread / self.nats

    def by_position(self, edges: list[int]) -> list[tuple[int, int, float, int]]:
        """(start, stop, mean nats, tokens) for the ranges of window positions between `edges`.

        Ranges without a scored token are left out.
        """
        ranges = []
        for a, b in zip(edges, edges[1:], strict=False):
            tokens = int(self.losses.position_tokens[a:b].sum())
            if tokens:
                nats = float(self.losses.position_nats[a:b].sum()) / tokens
                ranges.append((a, b, nats, tokens))
        return ranges

    def by_phase(self, period: int) -> list[tuple[float, int]]:
        """(mean nats, tokens) for each window position modulo `period`; NaN without a token.

        Shows how the loss grows within a group, where the shortened levels were last updated.
        """
        phases = np.arange(len(self.losses.position_nats)) % period
        nats = np.bincount(phases, self.losses.position_nats, period)
        tokens = np.bincount(phases, self.losses.position_tokens, period).astype(np.int64)
        with np.errstate(invalid="ignore"):
            return list(zip((nats / tokens).tolist(), tokens.tolist(), strict=True))


@torch.inference_mode()
def score_windows(
    model: Hourglass,
    text: TokenSequence,
    tokens: int,
    protocol: SlidingWindows,
    *,
    batch_size: int = 8,
    start_token: int = 0,
    separate: bool = False,
    first: int = 0,
    last: int | None = None,
    count_bytes: Callable[[NDArray[np.int64]], int] = len,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Losses:
    """Score windows `first` to `last` of a text of `tokens` tokens, `batch_size` at a time.

    `start_token` precedes the text, and every window where windows are `separate`. `count_bytes`
    returns the bytes of text that token ids decode to. `advance` is called with the number of
    tokens of each batch. Raises DataError where the text cannot be read.
    """
    device = next(model.parameters()).device
    nats, counts, sizes = [np.zeros(0)], [np.zeros(0, np.int64)], []
    position_nats = torch.zeros(protocol.length, dtype=torch.float64, device=device)
    position_tokens = np.zeros(protocol.length, np.int64)
    for inputs, labels in window_batches(
        text, tokens, protocol, batch_size=batch_size, start_token=start_token, separate=separate,
        first=first, last=last,
    ):  # fmt: skip
        ids, targets = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
        losses = model.parts.cross_entropy(model(ids), targets).double()  # 0 where label is -1
        counted = labels >= 0
        nats.append(losses.sum(1).cpu().numpy())
        counts.append(counted.sum(1))
        sizes += [count_bytes(row[mask]) for row, mask in zip(labels, counted, strict=True)]
        position_nats[: losses.shape[1]] += losses.sum(0)
        position_tokens[: losses.shape[1]] += counted.sum(0)
        advance(int(counted.sum()))
    return Losses(
        np.concatenate(nats), np.concatenate(counts), np.array(sizes, np.int64),
        position_nats.cpu().numpy(), position_tokens,
    )  # fmt: skip


def score_text(
    model: Hourglass,
    tokenizer: Tokenizer,
    text: bytes,
    protocol: SlidingWindows,
    *,
    batch_size: int = 8,
    first_token: FirstToken = "previous",
) -> Score:
    """Score a text held in memory, as one document; `text` is not empty."""
    zero = first_token == "zero"
    ids = tokenizer.encode(text)
    losses = score_windows(
        model, Tokens(ids), len(ids), protocol, batch_size=batch_size,
        start_token=0 if zero else tokenizer.eod or 0, separate=zero,
        count_bytes=tokenizer.count_bytes,
    )  # fmt: skip
    return Score(losses, len(text))
