"""The order of one source's training windows: a pure function of (seed, windows consumed).

Nothing here depends on ranks, workers or batches, and all of it follows from the index:

    epoch    the shards are permuted and dealt to at most 16 canonical streams;
    stream   its shards one after another, each cut into windows from a drawn offset on;
    block    up to 256 neighbouring windows of a shard, served in a drawn order;
    turns    each round takes one window of every stream that still has one.

Every window of an epoch is served once, then the next epoch begins. A jump needs no history: the
number of windows of a shard is the same in every epoch. Only a change of the sequence length in
the middle of an epoch does (`WindowOrder.recut`): what is left of the epoch is cut anew.
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
class ShuffleBlock:
    """Neighbouring windows of a shard, read at once and served in the order `windows`."""

    epoch: int
    first: int  # number, in the stream, of the first window served
    shard: int
    start: int  # position in the shard of the block's first token
    stop: int  # and just past its last one
    windows: Ints  # (n,) window w begins w L tokens after `start`


class WindowOrder:
    """Where the n-th training window lies, for shards of the given lengths.

    A window is L + 1 tokens, inputs and labels; its neighbours start L tokens away, so every
    label is predicted once. `aligned`: every L tokens of a shard are a document of their own, as
    images are; a window then is one document, and an epoch has them all. Raises DataError where
    no shard is long enough for one window.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int] | Ints,
        *,
        sequence_length: int,
        seed: int,
        aligned: bool = False,
    ) -> None:
        if seed < 0:
            raise DataError(f"the seed of the data order is {seed}: choose 0 or more")
        self.sequence_length, self.seed, self.aligned = sequence_length, seed, aligned
        self._tokens = np.asarray(shard_tokens, np.int64)
        self.streams = min(MAX_STREAMS, len(self._tokens))
        self.windows_per_epoch = int(self._windows_in(self._whole(slice(None))).sum())
        if not self.windows_per_epoch:
            longest = int(self._tokens.max(initial=0))
            raise DataError(
                f"sequence_length {sequence_length} needs {sequence_length + 1} tokens in a row, "
                f"the longest training shard has {longest}: shorten the sequence or prepare the "
                "data again with larger --shard-tokens"
            )
        self._plan = lru_cache(maxsize=4)(self._make_plan)  # a batch may cross an epoch
        self._first_epoch = 0  # the epoch that window 0 lies in, and what of it is to be served:
        self._left: list[Ints] | None = None
        self._first_windows = self.windows_per_epoch

    def recut(self, windows: int, *, sequence_length: int, aligned: bool = False) -> WindowOrder:
        """The order of what is left after `windows` windows, cut to another length.

        Shards not begun are cut as always. Of the shard that a stream is in, every stretch not
        yet served is cut by itself; what of a stretch does not fill a window is left out of this
        epoch, as a shard's ends are. No token is a label twice in an epoch. Between text and
        aligned documents, shards already begun are left out whole.
        """
        other = WindowOrder(
            self._tokens, sequence_length=sequence_length, seed=self.seed, aligned=aligned
        )
        epoch, inside = self._locate(windows)
        other._first_epoch = epoch
        other._left = self._left_after(epoch, inside, parts=not (aligned or self.aligned))
        other._first_windows = other._plan(epoch).windows
        return other

    @property
    def first_pass(self) -> int:
        """Windows until epoch 0, the first pass over the data, is complete."""
        return self._first_windows if self._first_epoch == 0 else 0

    def epochs(self, windows: int) -> float:
        """Passes over the data after `windows` windows."""
        epoch, inside = self._locate(windows)
        left = self._plan(epoch).windows - inside
        return epoch + max(0.0, 1 - left / self.windows_per_epoch)

    def turns(self, first: int, count: int) -> tuple[Ints, Ints, Ints]:
        """(epoch, stream, number in the stream), (count,) each, of the windows first, first + 1…"""
        parts = [(np.empty(0, np.int64),) * 3]
        while count:
            epoch, inside = self._locate(first)
            plan = self._plan(epoch)
            taken = min(count, plan.windows - inside)
            streams, numbers = plan.turns(inside + np.arange(taken))
            parts.append((np.full(taken, epoch, np.int64), streams, numbers))
            first, count = first + taken, count - taken
        epochs, streams, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        return epochs, streams, numbers

    def block(self, epoch: int, stream: int, number: int) -> ShuffleBlock:
        """The block that holds the window `number` of a stream."""
        plan, length = self._plan(epoch), self.sequence_length
        place = int(np.searchsorted(plan.starts[stream], number, side="right")) - 1
        piece = plan.pieces[stream][place]
        windows, begin = int(plan.counts[stream][place]), int(plan.starts[stream][place])
        # Blocks of equal size (within one), not full ones and a small rest that hardly shuffles.
        blocks = -(-windows // MAX_BLOCK)
        which = ((number - begin + 1) * blocks - 1) // windows
        low, high = which * windows // blocks, (which + 1) * windows // blocks
        shard, start = int(piece[0]), self._begin(epoch, piece) + low * length
        return ShuffleBlock(
            epoch=epoch,
            first=begin + low,
            shard=shard,
            start=start,
            stop=start + (high - low) * length + (not self.aligned),
            windows=shuffled(high - low, self.seed, Draw.BLOCK, epoch, shard, start),
        )

    def _locate(self, window: int) -> tuple[int, int]:
        """The epoch of a window, and its number there."""
        if window < self._first_windows:
            return self._first_epoch, window
        epochs, inside = divmod(window - self._first_windows, self.windows_per_epoch)
        return self._first_epoch + 1 + epochs, inside

    # A piece is a row (shard, start, stop): tokens of a shard to cut windows from.

    def _whole(self, shards: Ints | slice) -> Ints:
        numbers = np.arange(len(self._tokens))[shards]
        return np.stack([numbers, np.zeros_like(numbers), self._tokens[shards]], 1)

    def _is_whole(self, pieces: Ints) -> NDArray[np.bool_]:
        return (pieces[:, 1] == 0) & (pieces[:, 2] == self._tokens[pieces[:, 0]])

    def _windows_in(self, pieces: Ints) -> Ints:
        """How many windows each piece gives.

        A whole shard gives one fewer than would fit, so that the offset can be any of 0..L-1 and
        the count is the same in every epoch; the one window of a shard under 2 L tokens stays.
        """
        length, tokens = self.sequence_length, pieces[:, 2] - pieces[:, 1]
        if self.aligned:
            return tokens // length
        whole = np.maximum(tokens // length - 1, tokens > length)
        return np.where(self._is_whole(pieces), whole, np.maximum(tokens - 1, 0) // length)

    def _begin(self, epoch: int, piece: Ints) -> int:
        """Where the first window of a piece starts: each epoch cuts a shard at other places."""
        windows, whole = self._windows_in(piece[None])[0], self._is_whole(piece[None])[0]
        if self.aligned or not whole:
            return int(piece[1])
        spare = int(piece[2] - windows * self.sequence_length)
        return int(draws(1, self.seed, Draw.OFFSET, epoch, int(piece[0]))[0] % np.uint64(spare))

    def _make_plan(self, epoch: int) -> _EpochPlan:
        if epoch == self._first_epoch and self._left is not None:
            pieces = self._left
        else:
            shards = shuffled(len(self._tokens), self.seed, Draw.SHARDS, epoch)
            hands = assign_shards(shards, self._tokens, self.streams)
            pieces = [self._whole(np.array(hand, np.int64)) for hand in hands]
        return _EpochPlan(pieces, [self._windows_in(part) for part in pieces])

    def _left_after(self, epoch: int, inside: int, parts: bool) -> list[Ints]:
        """The pieces of each stream not served by the first `inside` windows of an epoch.

        `parts`: with those of the shard that a stream is in.
        """
        plan, left = self._plan(epoch), []
        for stream, served in enumerate(plan.served(inside)):
            pieces, counts, starts = (x[stream] for x in (plan.pieces, plan.counts, plan.starts))
            begun = np.flatnonzero((starts < served) & (served < starts + counts))
            later = pieces[(starts >= served) | (counts == 0)]
            if not parts:
                later = later[self._is_whole(later)]
            elif len(begun):
                rest = self._rest_of(self.block(epoch, stream, int(served)), served, pieces[begun])
                later = np.concatenate([rest, later])
            left.append(later)
        return left

    def _rest_of(self, block: ShuffleBlock, served: int, piece: Ints) -> Ints:
        """What is left of a piece (1, 3) whose windows are served up to within `block`."""
        length, count = self.sequence_length, len(block.windows)
        unserved = np.zeros(count + 1, np.int64)
        unserved[block.windows[served - block.first :]] = 1
        unserved[count] = 1  # what follows the block
        edges = np.flatnonzero(np.diff(unserved, prepend=0, append=0))
        runs = np.stack([np.full(len(edges) // 2, block.shard), edges[::2], edges[1::2]], 1)
        runs[:, 1:] = block.start + runs[:, 1:] * length
        runs[:, 2] += 1
        runs[-1, 2] = piece[0, 2]
        return runs


class _EpochPlan:
    """One epoch: the pieces of each stream, and whose turn it is."""

    def __init__(self, pieces: list[Ints], counts: list[Ints]) -> None:
        self.pieces, self.counts = pieces, counts  # by stream: (n, 3), and the windows of each
        self.starts = [np.cumsum(part) - part for part in counts]  # first window of each piece
        self._lengths = np.array([part.sum() for part in counts], np.int64)
        self.windows = int(self._lengths.sum())
        # Rounds between two ends of streams have the same streams: a phase. Its first round, the
        # streams alive in it, and the windows served before it:
        self._rounds = np.concatenate([[0], np.unique(self._lengths)[:-1]])
        self._alive = [np.flatnonzero(self._lengths > begin) for begin in self._rounds]
        self._served = np.array([np.minimum(self._lengths, r).sum() for r in self._rounds])

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

    def served(self, windows: int) -> Ints:
        """How many windows each stream has served after `windows` of the epoch."""
        phase = int(np.searchsorted(self._served, windows, side="right")) - 1
        alive = self._alive[phase]
        counts = np.minimum(self._lengths, self._rounds[phase])
        if len(alive):
            rounds, rest = divmod(windows - int(self._served[phase]), len(alive))
            counts[alive] += rounds
            counts[alive[:rest]] += 1
        return counts


def assign_shards(order: Ints, tokens: Ints, streams: int) -> list[list[int]]:
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
