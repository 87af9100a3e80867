"""The order of training windows: a pure function of (seed, windows consumed).

Nothing here depends on ranks, workers or batches, and all of it follows from the index:

    epoch    the shards are permuted and dealt to at most 16 canonical streams;
    stream   its shards one after another, each cut into windows from a drawn offset on;
    block    up to 256 neighbouring windows of a shard, served in a drawn order;
    turns    each round takes one window of every stream that still has one.

Every window of an epoch is served once, then the next epoch begins. A jump needs no history: the
number of windows of a shard is the same in every epoch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError

MAX_STREAMS = 16
MAX_BLOCK = 256  # windows; a reader holds one block a stream

Ints = NDArray[np.int64]


class Draw(IntEnum):
    """What random bits are for: each use has a sequence of its own."""

    SHARDS = 0
    OFFSET = 1
    BLOCK = 2


@dataclass(frozen=True)
class Block:
    """Neighbouring windows of a shard, read at once and served in the order `windows`."""

    epoch: int
    first: int  # number, in the stream, of the first window served
    shard: int
    start: int  # position in the shard of the block's first token
    windows: Ints  # (n,) window w covers the tokens [start + w L, start + w L + L], L + 1 of them

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether (epoch, number in the stream) lies in this block."""
        epoch, number = place
        return epoch == self.epoch and 0 <= number - self.first < len(self.windows)


class WindowOrder:
    """Where the n-th training window lies, for shards of the given lengths.

    A window is L + 1 tokens, inputs and labels; its neighbours start L tokens away, so every
    label is predicted once. Raises DataError where no shard is long enough for one window.
    """

    def __init__(self, shard_tokens: Sequence[int], *, sequence_length: int, seed: int) -> None:
        if seed < 0:
            raise DataError(f"the seed of the data order is {seed}: choose 0 or more")
        self.sequence_length, self.seed = sequence_length, seed
        self._tokens = np.asarray(shard_tokens, np.int64)
        self._windows = windows_in(self._tokens, sequence_length)
        self._used = np.flatnonzero(self._windows)
        self.windows_per_epoch = int(self._windows.sum())
        if not self.windows_per_epoch:
            longest = int(self._tokens.max(initial=0))
            raise DataError(
                f"sequence_length {sequence_length} needs {sequence_length + 1} tokens in a row, "
                f"the longest training shard has {longest}: shorten the sequence or prepare the "
                "data again with larger --shard-tokens"
            )
        self.streams = min(MAX_STREAMS, len(self._used))
        self._plan = lru_cache(maxsize=4)(self._make_plan)  # a batch may cross an epoch

    def turns(self, first: int, count: int) -> tuple[Ints, Ints, Ints]:
        """(epoch, stream, number in the stream), (count,) each, of the windows first, first + 1…"""
        parts = []
        while count:
            epoch, inside = divmod(first, self.windows_per_epoch)
            taken = min(count, self.windows_per_epoch - inside)
            streams, numbers = self._plan(epoch).turns(inside + np.arange(taken))
            parts.append((np.full(taken, epoch, np.int64), streams, numbers))
            first, count = first + taken, count - taken
        epochs, streams, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        return epochs, streams, numbers

    def block(self, epoch: int, stream: int, number: int) -> Block:
        """The block that holds the window `number` of a stream."""
        plan = self._plan(epoch)
        place = int(np.searchsorted(plan.starts[stream], number, side="right")) - 1
        shard = plan.shards[stream][place]
        windows, begin = int(self._windows[shard]), int(plan.starts[stream][place])
        # Blocks of equal size (within one), not full ones and a small rest that hardly shuffles.
        blocks = -(-windows // MAX_BLOCK)
        which = ((number - begin + 1) * blocks - 1) // windows
        low, high = which * windows // blocks, (which + 1) * windows // blocks
        return Block(
            epoch=epoch,
            first=begin + low,
            shard=shard,
            start=self.offset(epoch, shard) + low * self.sequence_length,
            windows=shuffled(high - low, self.seed, Draw.BLOCK, epoch, shard, which),
        )

    def offset(self, epoch: int, shard: int) -> int:
        """Where the first window of a shard starts: each epoch cuts the text at other places."""
        spare = int(self._tokens[shard] - self._windows[shard] * self.sequence_length)
        return int(draws(1, self.seed, Draw.OFFSET, epoch, shard)[0] % np.uint64(spare))

    def _make_plan(self, epoch: int) -> _EpochPlan:
        shuffle = shuffled(len(self._used), self.seed, Draw.SHARDS, epoch)
        shards = deal(self._used[shuffle], self._tokens, self.streams)
        return _EpochPlan(shards, [self._windows[part] for part in shards])


class _EpochPlan:
    """One epoch: the shards of each stream, and whose turn it is."""

    def __init__(self, shards: list[list[int]], windows: list[Ints]) -> None:
        self.shards = shards
        self.starts = [np.cumsum(part) - part for part in windows]  # first window of each shard
        lengths = np.array([part.sum() for part in windows])
        # Rounds between two ends of streams have the same streams: a phase. Its first round, the
        # streams alive in it, and the windows served before it:
        self._rounds = np.concatenate([[0], np.unique(lengths)[:-1]])
        self._alive = [np.flatnonzero(lengths > begin) for begin in self._rounds]
        self._served = np.array([np.minimum(lengths, begin).sum() for begin in self._rounds])

    def turns(self, windows: Ints) -> tuple[Ints, Ints]:
        """(stream, number in the stream) of the given windows of the epoch, ascending."""
        phases = np.searchsorted(self._served, windows, side="right") - 1
        streams, numbers = np.empty_like(windows), np.empty_like(windows)
        for phase in np.unique(phases):
            here, alive = phases == phase, self._alive[phase]
            since = windows[here] - self._served[phase]
            streams[here] = alive[since % len(alive)]
            numbers[here] = self._rounds[phase] + since // len(alive)
        return streams, numbers


def windows_in(tokens: Ints, sequence_length: int) -> Ints:
    """How many windows shards of `tokens` give in an epoch.

    One fewer than would fit, so that the offset can be any of 0..L-1 and the count is the same
    in every epoch; the one window of a shard under 2 L tokens stays.
    """
    return np.maximum(tokens // sequence_length - 1, tokens > sequence_length)


def deal(order: Ints, tokens: Ints, streams: int) -> list[list[int]]:
    """Deal shards, in this order, each to the stream with the fewest tokens so far.

    Streams then end within one shard of each other, whatever the sizes of the shards.
    """
    hands: list[list[int]] = [[] for _ in range(streams)]
    heap = [(0, stream) for stream in range(streams)]
    for shard in order.tolist():
        total, stream = heapq.heappop(heap)
        hands[stream].append(shard)
        heapq.heappush(heap, (total + int(tokens[shard]), stream))
    return hands


def draws(count: int, seed: int, *key: int) -> NDArray[np.uint64]:
    """Random 64-bit words (count,), the same for equal arguments on every machine.

    NumPy promises that for seed sequences and bit generators, and for no method above them
    (`permutation`, `integers`): so none is used here.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key))
    return np.random.PCG64(sequence).random_raw(count)


def shuffled(count: int, seed: int, *key: int) -> Ints:
    """A permutation of 0..count-1 drawn for the key."""
    return np.argsort(draws(count, seed, *key), kind="stable").astype(np.int64)
