"""Fixed groups of k positions: which positions a group pools, and which positions it is given to.

Causality: group j is given to positions jk .. jk+k-1, so it must not contain anything after
position jk. The sequence is therefore shifted right by exactly k-1 before it is split (paper,
section 2.2): with k-2 it leaks, with k it is causal but one position stale. Group j then pools
positions jk-(k-1) .. jk, and the k-1 positions before the first are zero vectors.

Any length works. A last, incomplete group needs no padding on the right, since its positions after
jk belong to the next one; expanded positions beyond the end are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Alignment:
    """How queries and keys of an attention are aligned.

    Query i is at position i * query_step, key j at j * key_step, both counted in positions of the
    longer sequence. At least one step is 1: both for attention inside a stack, the keys' for
    shortening, the queries' for upsampling.
    """

    queries: int
    keys: int
    query_step: int = 1
    key_step: int = 1

    def visible(self, device: torch.device) -> Tensor:
        """Return (queries, keys) bool: which keys a query may see."""
        i = torch.arange(self.queries, device=device)[:, None]
        j = torch.arange(self.keys, device=device)
        return (j * self.key_step) // self.query_step <= i


@dataclass(frozen=True)
class FixedGroups:
    """Groups of k positions over `length` positions, of which the first is position `first`.

    `shift` needs the complete sequence (first 0); decoding collects the members of a group with
    `OpenGroup` instead.
    """

    k: int
    length: int
    first: int = 0

    @property
    def offset(self) -> int:
        """Offset of the first position among the k positions that its group is given to."""
        return self.first % self.k

    @property
    def count(self) -> int:
        """Number of groups that are given to the positions."""
        return -(-(self.offset + self.length) // self.k)

    @property
    def open_members(self) -> int:
        """Number of positions at the end whose group is not complete yet."""
        return (self.first + self.length - 1) % self.k

    def shift(self, x: Tensor) -> Tensor:
        """Shift right by k-1 and cut to complete groups: (B, length, d) -> (B, count * k, d)."""
        shifted = F.pad(x, (0, 0, self.k - 1, 0))  # zero vectors in front
        return shifted[:, : self.count * self.k]

    def split(self, shifted: Tensor) -> Tensor:
        """Split into groups: (B, count * k, d) -> (B, count, k, d)."""
        return shifted.unflatten(1, (self.count, self.k))

    def repeat(self, z: Tensor) -> Tensor:
        """Give every position the vector of its group: (B, count, d) -> (B, length, d)."""
        return z.repeat_interleave(self.k, 1)[:, self.offset : self.offset + self.length]

    def unfold(self, z: Tensor) -> Tensor:
        """Give every position its slice of its group: (B, count, k * d) -> (B, length, d)."""
        positions = z.unflatten(2, (self.k, -1)).flatten(1, 2)
        return positions[:, self.offset : self.offset + self.length]

    @property
    def shortening(self) -> Alignment:
        """Groups attend to the shifted sequence; group i sees the members of groups 0 .. i."""
        return Alignment(self.count, self.count * self.k, self.k, 1)

    @property
    def upsampling(self) -> Alignment:
        """Positions attend to the groups; position i sees groups 0 .. floor(i / k)."""
        return Alignment(self.length, self.count, 1, self.k)
