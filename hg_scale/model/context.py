"""The context of one forward pass: factors, dropout key, cache. And dropout, which depends on it.

Nothing here is state, except the cache of decoding. Dropout masks are a pure function of (seed,
step, sample, site), so they are the same in every layout, after a resume, and in a recomputed
forward pass.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from hg_scale.model.cache import Cache

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash integers to a 63-bit seed (splitmix64's finaliser, chained)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def name_seed(seed: int, name: str) -> int:
    """Return the seed for a name: of a parameter's initial weights, or of a dropout site."""
    return mix(seed, zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Context:
    """One forward pass.

    `factors`: step factor of every shortening, outermost first. `key`: (seed, step) in training,
    else None. `first_sample`: index of the first sequence in the global batch. `cache`: the state
    of decoding; None if the pass computes all positions.
    """

    factors: tuple[int, ...]
    key: tuple[int, int] | None = None
    first_sample: int = 0
    cache: Cache | None = None

    def tokens_per_position(self, level: int) -> int:
        """Return how many tokens a position of `level` stands for, with this pass's factors."""
        return prod(self.factors[:level])


def draw_factors(choices: list[list[int]], seed: int, step: int) -> tuple[int, ...]:
    """Draw this step's factors for shorten-factor dropout (paper, section 4.1).

    They are identical on all ranks.
    """
    generator = random.Random(mix(seed, step, zlib.crc32(b"shorten_factor")))
    return tuple(generator.choice(options) for options in choices)


class Dropout(nn.Module):
    """Inverted dropout whose mask depends on nothing but (seed, step, sample, site).

    `split_dim`, `rank`, `ranks`: the dimension along which tensor parallelism shards the input,
    and the slice of this rank; the unsharded mask is drawn and sliced the same way. `site` is set
    from the module's name.
    """

    def __init__(self, rate: float, split_dim: int | None = None, rank: int = 0, ranks: int = 1):
        super().__init__()
        self.rate, self.split_dim, self.rank, self.ranks = rate, split_dim, rank, ranks
        self.site = 0

    def extra_repr(self) -> str:
        return f"{self.rate}"

    def active(self, context: Context) -> bool:
        return self.rate > 0 and context.key is not None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Apply dropout to x (B, ...) of any dtype; x[b] is sample `context.first_sample + b`."""
        if self.rate == 0 or context.key is None:
            return x
        seed, step = context.key
        shape = list(x.shape[1:])
        if self.split_dim is not None:
            dim = self.split_dim % x.dim() - 1
            shape[dim] *= self.ranks
        generator = torch.Generator(x.device)
        keep = torch.empty((x.shape[0], *shape), dtype=torch.bool, device=x.device)
        for index, mask in enumerate(keep):
            generator.manual_seed(mix(seed, step, context.first_sample + index, self.site))
            mask.bernoulli_(1 - self.rate, generator=generator)
        if self.split_dim is not None:
            keep = keep.chunk(self.ranks, self.split_dim)[self.rank]
        return x * keep * (1 / (1 - self.rate))
