"""Which positions form a group, decided here and nowhere else: every k-th position ends one.

Causality. Group j is given to positions jk .. jk+k-1, so it may hold nothing after position jk:
the sequence is shifted right by exactly k-1 before it is cut (paper, section 2.2). With k-2 it
leaks, with k it is causal but one position stale. Group j then pools positions jk-(k-1) .. jk, and
the k-1 positions before the first are zero vectors.

Any length works: a last, incomplete group needs no padding on the right, since its positions
after jk belong to the next one; what is spread past the end is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Alignment:
    """How the positions of queries and keys of an attention lie to each other.

    Query i stands at i * query_step, key j at j * key_step, both in positions of the finer
    sequence. One of the two steps is 1: both for attention inside a stack, the keys' for
    shortening, the queries' for upsampling.
    """

    queries: int
    keys: int
    query_step: int = 1
    key_step: int = 1

    def visible(self, device: torch.device) -> Tensor:
        """(queries, keys) bool: which keys a query may see."""
        i = torch.arange(self.queries, device=device)[:, None]
        j = torch.arange(self.keys, device=device)
        return (j * self.key_step) // self.query_step <= i


@dataclass(frozen=True)
class FixedGroups:
    """Groups of k positions over a sequence of `length`, or of its part from position `first` on.

    Only a whole sequence can be shifted; decoding gathers its groups by `gathered`.
    """

    k: int
    length: int
    first: int = 0

    @property
    def place(self) -> int:
        """The place of the first position among those that its group is given to."""
        return self.first % self.k

    @property
    def count(self) -> int:
        """How many groups the positions are given."""
        return -(-(self.place + self.length) // self.k)

    @property
    def gathered(self) -> int:
        """How many positions at the end are members of a group that is not whole yet."""
        return (self.first + self.length - 1) % self.k

    def shift(self, x: Tensor) -> Tensor:
        """Shift right by k-1 and cut to whole groups: (B, length, d) -> (B, count * k, d)."""
        shifted = F.pad(x, (0, 0, self.k - 1, 0))  # zero vectors in front
        return shifted[:, : self.count * self.k]

    def cut(self, shifted: Tensor) -> Tensor:
        """(B, count * k, d) -> (B, count, k, d)."""
        return shifted.unflatten(1, (self.count, self.k))

    def spread(self, z: Tensor) -> Tensor:
        """Give every position its group's vector: (B, count, d) -> (B, length, d)."""
        return z.repeat_interleave(self.k, 1)[:, self.place : self.place + self.length]

    def lay_out(self, z: Tensor) -> Tensor:
        """One vector for each place in a group: (B, count, k * d) -> (B, length, d)."""
        by_place = z.unflatten(2, (self.k, -1)).flatten(1, 2)
        return by_place[:, self.place : self.place + self.length]

    @property
    def shortening(self) -> Alignment:
        """Groups asking the shifted sequence; group i sees the members of groups 0 .. i."""
        return Alignment(self.count, self.count * self.k, self.k, 1)

    @property
    def upsampling(self) -> Alignment:
        """Positions asking the groups; position i sees groups 0 .. floor(i / k)."""
        return Alignment(self.length, self.count, 1, self.k)
