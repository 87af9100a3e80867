"""Sampling of the next token: temperature, top-k, top-p, greedy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled from logits.

    `temperature`: 0 is greedy. `top_k`: only the k most likely tokens. `top_p`: only the smallest
    set of most likely tokens with at least this probability, after the temperature and the top k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Sample token ids (B,) from logits (B, vocabulary), given numbers (B,) fp32 in [0, 1).

        The number determines the token: the first, in the order of the ids, at which the
        cumulative probability exceeds it.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = self.probabilities(logits).cumsum(-1)
        target = uniform.double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution, (B, vocabulary) in float64; the temperature must exceed 0."""
        # Subtract the maximum first: at any temperature nothing overflows, except to -inf.
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            threshold = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
        probabilities = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, ids = probabilities.sort(stable=True, dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, ids, ordered)
        return probabilities
