"""Which token follows: temperature, top-k, top-p, greedy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    `temperature`: 0 takes the likeliest. `top_k`: only from the k likeliest. `top_p`: only from the
    fewest that have this probability together; after the temperature and the top k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Token ids (B,) from logits (B, vocabulary) and numbers (B,) in [0, 1), fp32.

        The number decides: where the probabilities, in the order of the ids, add up past it.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = self.probabilities(logits).cumsum(-1)
        target = uniform.double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (B, vocabulary) in float64, for a temperature above 0."""
        # From the largest on: however cold it is, nothing overflows but to -inf.
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probabilities = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, ids = probabilities.sort(stable=True, dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, ids, ordered)
        return probabilities
