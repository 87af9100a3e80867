"""What decoding keeps of the positions before: a memory for each layer that needs one.

A pass whose `Context` has a cache takes it up by itself: the first pass (the prompts, all positions
at once) makes the memories, each pass after it brings one new position a row at full length, and
at a shorter level one or none. So a layer has one `forward` for training, prompt and steps.

Rows of different lengths end together. The cache counts positions from the beginning of the
longest row; a shorter one begins later, by a multiple of the model's total factor, and so all rows
are at the same place of their groups at every level. The prompts themselves are padded on the
right, where causality keeps the padding out of what comes before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Cache:
    """The memories of a model's layers, by layer; room for `length` tokens a row.

    `offsets`: (B,) int64, tokens by which a row begins later than the longest; None where all are
    equally long. `position`: the token at which the current pass begins.
    """

    def __init__(self, length: int, offsets: Tensor | None = None) -> None:
        self.length, self.offsets = length, offsets
        self.position = 0
        self._memories: dict[nn.Module, Any] = {}

    @property
    def start(self) -> int | Tensor:
        """Where the rows begin in this pass, (B,) where they differ: in the first pass only."""
        return self.position if self.position or self.offsets is None else self.offsets

    def of(self, layer: nn.Module) -> Any:
        """A layer's memory; None in the first pass, in which the layer is to `keep` one."""
        return self._memories.get(layer)

    def keep(self, layer: nn.Module, memory: KeyValues | OpenGroup | LastGroup) -> None:
        """Give a layer its memory."""
        self._memories[layer] = memory

    def offsets_at(self, unit: int) -> Tensor | None:
        """`offsets` in positions of `unit` tokens."""
        return None if self.offsets is None else self.offsets // unit

    def ends(self, x: Tensor, count: int, unit: int = 1) -> Tensor:
        """The last `count` positions of each row of the first pass: (B, n, d) -> (B, count, d).

        A position of x stands for `unit` tokens; rows are padded on the right.
        """
        last = torch.arange(x.shape[1] - count, x.shape[1], device=x.device)
        offsets = self.offsets_at(unit)
        if offsets is None:
            return x[:, x.shape[1] - count :].clone()
        return x.gather(1, (last - offsets[:, None])[..., None].expand(-1, -1, x.shape[2]))

    @property
    def bytes(self) -> int:
        """Bytes of all memories."""
        tensors = (t for m in self._memories.values() for t in vars(m).values())
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


class KeyValues:
    """Keys and values of one attention, in the order of their positions; a window's roll.

    `keys`, `values`: (B, heads, capacity, d_head); position i is in slot i % capacity. `hidden`:
    (B, 1, 1, capacity), minus infinity in the slots before a row's beginning; None where all rows
    begin together. `distances`: (places, heads, capacity, d_head), for relative scores: the
    embedded distance of the newest query, at each place of a group, to every key, the newest last;
    twice in a row where the keys roll, so that any turn of it is a slice.
    """

    def __init__(
        self, k: Tensor, v: Tensor, capacity: int, offsets: Tensor | None, distances: Tensor | None
    ) -> None:
        """The first pass: k, v (B, heads, n, d_head), rows padded on the right."""
        rows, heads, n, d_head = k.shape
        self.capacity, self.count, self.distances = capacity, n, distances
        self.keys, self.values = (t.new_zeros(rows, heads, capacity, d_head) for t in (k, v))
        self.hidden: Tensor | None = None
        kept = torch.arange(max(0, n - capacity), n, device=k.device)
        slots = kept % capacity
        if offsets is None:
            self.keys[:, :, slots], self.values[:, :, slots] = k[:, :, kept], v[:, :, kept]
            return
        place = kept - offsets[:, None]  # (B, kept), below 0 before the row's beginning
        index = place.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, d_head)
        self.keys[:, :, slots], self.values[:, :, slots] = k.gather(2, index), v.gather(2, index)
        self.hidden = k.new_zeros(rows, 1, 1, capacity)
        outside = k.new_zeros(place.shape).masked_fill(place < 0, float("-inf"))
        self.hidden[..., slots] = outside[:, None, None]

    def append(self, k: Tensor, v: Tensor) -> None:
        """The next positions, (B, heads, n, d_head), over the oldest where there is no room."""
        n, slot = k.shape[2], self.count % self.capacity
        self.keys.narrow(2, slot, n).copy_(k)
        self.values.narrow(2, slot, n).copy_(v)
        if self.hidden is not None and self.count >= self.capacity:
            self.hidden.narrow(3, slot, n).zero_()
        self.count += n

    @property
    def held(self) -> int:
        """How many positions are held."""
        return min(self.count, self.capacity)

    def view(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values (B, heads, held, d_head) and what is hidden of them (B, 1, 1, held)."""
        n = self.held
        hidden = None if self.hidden is None else self.hidden[..., :n]
        return self.keys[:, :, :n], self.values[:, :, :n], hidden

    def distances_at(self, place: int) -> Tensor:
        """The embedded distances of the keys in view: (heads, d_head, held)."""
        assert self.distances is not None
        table = self.distances[place]
        return table.narrow(1, -self.count % self.capacity, self.held).mT


class OpenGroup:
    """The members so far of the group that is not whole yet: (B, k, d), `count` of them there."""

    def __init__(self, members: Tensor, k: int) -> None:
        """The first pass: members (B, count, d)."""
        self.count = members.shape[1]
        self.members = members.new_zeros(members.shape[0], k, members.shape[2])
        self.members[:, : self.count] = members

    def add(self, x: Tensor) -> Tensor:
        """One more, (B, 1, d): the group (B, k, d) if it is whole now, else (B, 0, d)."""
        k = self.members.shape[1]
        self.members.narrow(1, self.count, 1).copy_(x)
        self.count = (self.count + 1) % k
        return self.members.narrow(1, 0, 0 if self.count else k)


class LastGroup:
    """What the newest group gives to its positions: (B, 1, d)."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def update(self, z: Tensor) -> Tensor:
        """z (B, 1, d) where a new group begins, else (B, 0, d); the newest (B, 1, d)."""
        if z.shape[1]:
            self.z = z
        return self.z
