"""What a model makes of text it has not seen: bits per byte of a split, on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch

from hg_scale.data.evaluation import evaluation_windows, split_bytes
from hg_scale.data.index import Index
from hg_scale.model.hourglass import Hourglass


@dataclass(frozen=True)
class Score:
    """Sum of the losses in nats over `tokens`, which stand for `bytes` of text."""

    nats: float
    tokens: int
    bytes: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.bytes


@torch.inference_mode()
def score_split(
    model: Hourglass,
    index: Index,
    split: str,
    rows: int = 8,
    limit_windows: int | None = None,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Score:
    """Score every token of a split once, in windows of the model's sequence length.

    A window begins without the text before it (but for one token), so the first tokens of each
    are guessed from little. `rows` windows go through the model at once; it does not change the
    result. Raises DataError where the split is empty or cannot be read.
    """
    length, tokens = model.config.sequence_length, index.split(split).tokens
    if limit_windows is not None:
        tokens = min(tokens, limit_windows * length)
    device = next(model.parameters()).device
    nats = 0.0
    for inputs, labels in evaluation_windows(
        index, split, sequence_length=length, rows=rows, limit_windows=limit_windows
    ):
        ids, targets = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
        losses = model.parts.cross_entropy(model(ids), targets)
        nats += float(losses.double().sum())
        advance(int((labels >= 0).sum()))
    share = tokens / index.split(split).tokens
    return Score(nats, tokens, split_bytes(index, split) * share)
