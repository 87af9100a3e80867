"""The cache of decoding: keys and values, open groups and last groups of the layers that need them.

A layer has one `forward` for training, prompt and decoding. In a pass whose `Context` has a cache,
the first pass (the prompts, all positions at once) stores an entry for each such layer; every later
pass has one new position per sequence at full length, and one or none at a shorter level.

Sequences of different lengths end together. The cache counts positions from the start of the
longest one; a shorter one starts later, by a multiple of the model's total factor, so that all
sequences have the same offset inside their groups at every level. The prompts are padded on the
right, where causality keeps the padding out of the positions before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Cache:
    """Cache entries by layer, with room for `length` tokens per sequence.

    `offsets`: (B,) int64, by how many tokens each sequence starts after the longest; None if all
    have equal lengths. `position`: the index of the first token of the current pass.
    """

    def __init__(self, length: int, offsets: Tensor | None = None) -> None:
        self.length, self.offsets = length, offsets
        self.position = 0
        self._entries: dict[nn.Module, Any] = {}

    @property
    def start(self) -> int | Tensor:
        """Position at which this pass starts; in the first pass (B,) if the lengths differ."""
        return self.position if self.position or self.offsets is None else self.offsets

    def get(self, layer: nn.Module) -> Any:
        """Return a layer's entry; None in the first pass, in which the layer has to store one."""
        return self._entries.get(layer)

    def store(self, layer: nn.Module, entry: KVCache | OpenGroup | LastGroup) -> None:
        """Store a layer's entry."""
        self._entries[layer] = entry

    def position_offsets(self, tokens_per_position: int) -> Tensor | None:
        """Return `offsets` in positions of a level."""
        return None if self.offsets is None else self.offsets // tokens_per_position

    def last_positions(self, x: Tensor, count: int, tokens_per_position: int = 1) -> Tensor:
        """Return the last positions of the first pass: (B, n, d) -> (B, count, d).

        Sequences are padded on the right.
        """
        last = torch.arange(x.shape[1] - count, x.shape[1], device=x.device)
        offsets = self.position_offsets(tokens_per_position)
        if offsets is None:
            return x[:, x.shape[1] - count :].clone()
        return x.gather(1, (last - offsets[:, None])[..., None].expand(-1, -1, x.shape[2]))

    @property
    def bytes(self) -> int:
        """Bytes of all entries."""
        tensors = (t for entry in self._entries.values() for t in vars(entry).values())
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


class KVCache:
    """Keys and values of one attention; with a window, a ring buffer.

    `keys`, `values`: (B, heads, capacity, d_head); position i is in slot i % capacity. `mask`:
    (B, 1, 1, capacity), minus infinity in the slots before the start of a sequence; None if all
    start together. `distances`: (key_step, heads, capacity, d_head), for relative positions: for
    every offset of the query inside its group, the embedded distance to every key, the newest key
    last. If the buffer wraps around it is repeated, so that any rotation of it is a slice.
    """

    def __init__(
        self, k: Tensor, v: Tensor, capacity: int, offsets: Tensor | None, distances: Tensor | None
    ) -> None:
        """Store the first pass: k, v (B, heads, n, d_head), padded on the right."""
        batch, heads, n, d_head = k.shape
        self.capacity, self.count, self.distances = capacity, n, distances
        self.keys, self.values = (t.new_zeros(batch, heads, capacity, d_head) for t in (k, v))
        self.mask: Tensor | None = None
        stored = torch.arange(max(0, n - capacity), n, device=k.device)
        slots = stored % capacity
        if offsets is None:
            self.keys[:, :, slots], self.values[:, :, slots] = k[:, :, stored], v[:, :, stored]
            return
        source = stored - offsets[:, None]  # (B, stored), negative before the start of a sequence
        index = source.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, d_head)
        self.keys[:, :, slots], self.values[:, :, slots] = k.gather(2, index), v.gather(2, index)
        self.mask = k.new_zeros(batch, 1, 1, capacity)
        outside = k.new_zeros(source.shape).masked_fill(source < 0, float("-inf"))
        self.mask[..., slots] = outside[:, None, None]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append positions (B, heads, n, d_head); in a full buffer they overwrite the oldest."""
        n, slot = k.shape[2], self.count % self.capacity
        self.keys.narrow(2, slot, n).copy_(k)
        self.values.narrow(2, slot, n).copy_(v)
        if self.mask is not None and self.count >= self.capacity:
            self.mask.narrow(3, slot, n).zero_()
        self.count += n

    @property
    def stored(self) -> int:
        """Number of positions in the buffer."""
        return min(self.count, self.capacity)

    def view(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values (B, heads, stored, d_head) and their mask (B, 1, 1, stored)."""
        n = self.stored
        mask = None if self.mask is None else self.mask[..., :n]
        return self.keys[:, :, :n], self.values[:, :, :n], mask

    def distances_at(self, group_offset: int) -> Tensor:
        """Return the embedded distances to the stored keys: (heads, d_head, stored).

        `group_offset`: offset of the newest query inside its group.
        """
        assert self.distances is not None
        table = self.distances[group_offset]
        return table.narrow(1, -self.count % self.capacity, self.stored).mT


class OpenGroup:
    """The members so far of an incomplete group: the first `count` of (B, k, d)."""

    def __init__(self, members: Tensor, k: int) -> None:
        """Store the members (B, count, d) after the first pass."""
        self.count = members.shape[1]
        self.members = members.new_zeros(members.shape[0], k, members.shape[2])
        self.members[:, : self.count] = members

    def add(self, x: Tensor) -> Tensor:
        """Add a member (B, 1, d); return the group (B, k, d) if it is complete, else (B, 0, d)."""
        k = self.members.shape[1]
        self.members.narrow(1, self.count, 1).copy_(x)
        self.count = (self.count + 1) % k
        return self.members.narrow(1, 0, 0 if self.count else k)


class LastGroup:
    """The upsampled vector of the newest group: (B, 1, d)."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def update(self, z: Tensor) -> Tensor:
        """Replace it by z (B, 1, d), or keep it if z is (B, 0, d); return the newest (B, 1, d)."""
        if z.shape[1]:
            self.z = z
        return self.z
