"""What a model makes of text it has not seen: losses of a text, each token scored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from hg_scale.data.protocol import TokenText, WindowProtocol, batches
from hg_scale.model.hourglass import Hourglass

PIECES = 30  # consecutive pieces of the text whose spread gives the interval
FEWEST = 10  # pieces; the spread of fewer says too little
_NORMAL_95 = 1.95996  # half the width of a 95% interval, in standard errors


def student_95(freedom: int) -> float:
    """The 97.5% quantile of Student's t with `freedom` >= FEWEST - 1 degrees, to 3 decimals."""
    z = _NORMAL_95  # Cornish-Fisher expansion in 1 / freedom
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Losses:
    """Sums of losses in nats (fp64), and how many tokens and bytes of text each is of.

    By window (N,) in the order of the text, and by position in the window (L,).
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    position_nats: NDArray[np.float64]
    position_tokens: NDArray[np.int64]

    @staticmethod
    def joined(parts: list[Losses]) -> Losses:
        """The losses of consecutive shares of the windows as one."""
        return Losses(
            np.concatenate([p.nats for p in parts]),
            np.concatenate([p.tokens for p in parts]),
            np.concatenate([p.bytes for p in parts]),
            np.sum([p.position_nats for p in parts], 0),
            np.sum([p.position_tokens for p in parts], 0),
        )


@dataclass(frozen=True)
class Score:
    """The losses of a text that is `bytes` long."""

    losses: Losses
    bytes: int

    @cached_property
    def nats(self) -> float:
        """Sum over all tokens."""
        return float(self.losses.nats.sum())

    @cached_property
    def tokens(self) -> int:
        """Tokens scored: all of the text."""
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
        """Half a 95% interval of bits a byte, as a fraction: how far the mean of the source
        (endless text of this kind) may lie.

        From the spread of up to 30 consecutive pieces (batch means), since neighbouring windows
        are alike; of fewer windows each is a piece. NaN for fewer than FEWEST windows.
        """
        sizes = self.losses.bytes
        pieces = min(PIECES, len(sizes))
        if pieces < FEWEST:
            return float("nan")
        nats, size = (
            np.array([part.sum() for part in np.array_split(values, pieces)])
            for values in (self.losses.nats, sizes)
        )
        # Of a ratio of sums: the spread of what each piece has beyond its share.
        beyond = nats - self.nats * size / size.sum()
        spread = sqrt((beyond**2).sum() * pieces / (pieces - 1))
        return student_95(pieces - 1) * spread / self.nats

    def by_position(self, edges: list[int]) -> list[tuple[int, int, float, int]]:
        """(first, after the last, mean nats, tokens) for positions in the window cut at `edges`;
        without stretches in which nothing was scored."""
        found = []
        for a, b in zip(edges, edges[1:], strict=False):
            tokens = int(self.losses.position_tokens[a:b].sum())
            if tokens:
                nats = float(self.losses.position_nats[a:b].sum()) / tokens
                found.append((a, b, nats, tokens))
        return found

    def by_phase(self, period: int) -> list[tuple[float, int]]:
        """(mean nats, tokens) by position modulo `period`: how stale the shortened levels are
        inside a group shows here. NaN where nothing was scored."""
        places = np.arange(len(self.losses.position_nats)) % period
        nats = np.bincount(places, self.losses.position_nats, period)
        tokens = np.bincount(places, self.losses.position_tokens, period).astype(np.int64)
        with np.errstate(invalid="ignore"):
            return list(zip((nats / tokens).tolist(), tokens.tolist(), strict=True))


@torch.inference_mode()
def score_windows(
    model: Hourglass,
    text: TokenText,
    tokens: int,
    how: WindowProtocol,
    *,
    rows: int = 8,
    begin: int = 0,
    separate: bool = False,
    first: int = 0,
    last: int | None = None,
    count_bytes: Callable[[NDArray[np.int64]], int] = len,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Losses:
    """Losses of the windows from `first` to `last` of a text of `tokens`: see `data/protocol.py`.

    `rows` windows go through the model at once; it does not change the result. `count_bytes`: of
    the text that tokens stand for. Raises DataError where the text cannot be read.
    """
    device = next(model.parameters()).device
    nats, counts, sizes = [np.zeros(0)], [np.zeros(0, np.int64)], []
    position_nats = torch.zeros(how.length, dtype=torch.float64, device=device)
    position_tokens = np.zeros(how.length, np.int64)
    for inputs, labels in batches(
        text, tokens, how, rows=rows, begin=begin, separate=separate, first=first, last=last
    ):
        ids, targets = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
        losses = model.parts.cross_entropy(model(ids), targets).double()  # 0 where label is -1
        counted = labels >= 0
        nats.append(losses.sum(1).cpu().numpy())
        counts.append(counted.sum(1))
        sizes += [count_bytes(row[of]) for row, of in zip(labels, counted, strict=True)]
        position_nats[: losses.shape[1]] += losses.sum(0)
        position_tokens[: losses.shape[1]] += counted.sum(0)
        advance(int(counted.sum()))
    return Losses(
        np.concatenate(nats), np.concatenate(counts), np.array(sizes, np.int64),
        position_nats.cpu().numpy(), position_tokens,
    )  # fmt: skip
