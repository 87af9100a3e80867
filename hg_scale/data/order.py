"""The order of one source's training sequences: a pure function of (seed, sequences consumed).

It does not depend on ranks, workers or batches; the index and the seed determine all of it:

    epoch     the shards are permuted and assigned to at most 16 canonical streams;
    stream    its shards in order, each chunked into sequences from a random offset on;
    block     up to 256 consecutive sequences of a shard, served in a random order;
    rounds    the streams alternate: a round takes one sequence of every stream that has any left.

An epoch serves every sequence once. Position n is computed without the history before it, since
the number of sequences of a shard is the same in every epoch. The one exception is a change of
the sequence length inside an epoch (`SequenceOrder.rechunk`): the remaining tokens of the epoch
are chunked again.
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
MAX_BLOCK = 256  # sequences; a reader holds one block per stream

Int64Array = NDArray[np.int64]


class RandomUse(IntEnum):
    """Part of the key of random numbers, so that each use has independent ones."""

    SHARDS = 0
    OFFSET = 1
    BLOCK = 2


@dataclass(frozen=True)
class ShuffleBlock:
    """Consecutive sequences of a shard, read at once and served in the order `permutation`."""

    epoch: int
    first: int  # number, in the stream, of the first sequence served
    shard: int
    start: int  # position in the shard of the block's first token
    stop: int  # and just past its last one
    permutation: Int64Array  # (n,) sequence i starts i * L tokens after `start`


class SequenceOrder:
    """Location of the n-th training sequence, for shards of the given numbers of tokens.

    A sequence is L + 1 tokens, inputs and labels; neighbours start L tokens apart, so every label
    is predicted once. `aligned`: every L tokens of a shard are one document (an image), a
    sequence is one document, and an epoch has all of them. Raises DataError where no shard is long
    enough for one sequence.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int] | Int64Array,
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
        all_shards = self._full_shards(slice(None))
        self.sequences_per_epoch = int(self._count_sequences(all_shards).sum())
        if not self.sequences_per_epoch:
            longest = int(self._tokens.max(initial=0))
            raise DataError(
                f"sequence_length {sequence_length} needs {sequence_length + 1} tokens in a row, "
                f"the longest training shard has {longest}: shorten the sequence or prepare the "
                "data again with larger --shard-tokens"
            )
        self._plan = lru_cache(maxsize=4)(self._make_plan)  # a batch may span two epochs
        # The epoch of sequence 0, the spans of it still to serve (None: all), and their sequences.
        self._start_epoch = 0
        self._remaining: list[Int64Array] | None = None
        self._start_epoch_sequences = self.sequences_per_epoch

    def rechunk(
        self, consumed: int, *, sequence_length: int, aligned: bool = False
    ) -> SequenceOrder:
        """Return the order of the data left after `consumed` sequences, for another length.

        Shards that no sequence was served of yet are chunked as always. Of the shard that a stream
        is reading, every contiguous stretch not served yet is chunked on its own; the tokens at
        its end that fill no sequence are left out of this epoch, as at a shard's end. No token is
        a label twice in an epoch. Between text and aligned documents, partly served shards are
        left out entirely.
        """
        other = SequenceOrder(
            self._tokens, sequence_length=sequence_length, seed=self.seed, aligned=aligned
        )
        epoch, number = self._epoch_of(consumed)
        other._start_epoch = epoch
        other._remaining = self._remaining_spans(
            epoch, number, partly_served=not (aligned or self.aligned)
        )
        other._start_epoch_sequences = other._plan(epoch).sequences
        return other

    @property
    def first_epoch_sequences(self) -> int:
        """Number of sequences until epoch 0, the first pass over the data, is complete."""
        return self._start_epoch_sequences if self._start_epoch == 0 else 0

    def epochs(self, consumed: int) -> float:
        """Return the epochs after `consumed` sequences, with fractions."""
        epoch, number = self._epoch_of(consumed)
        left = self._plan(epoch).sequences - number
        return epoch + max(0.0, 1 - left / self.sequences_per_epoch)

    def locate(self, first: int, count: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (epoch, stream, number in the stream) of sequences first to first + count - 1.

        Each is an array (count,).
        """
        parts = [(np.empty(0, np.int64),) * 3]
        while count:
            epoch, number = self._epoch_of(first)
            plan = self._plan(epoch)
            taken = min(count, plan.sequences - number)
            streams, numbers = plan.locate(number + np.arange(taken))
            parts.append((np.full(taken, epoch, np.int64), streams, numbers))
            first, count = first + taken, count - taken
        epochs, streams, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        return epochs, streams, numbers

    def block(self, epoch: int, stream: int, number: int) -> ShuffleBlock:
        """Return the block that contains sequence `number` of a stream."""
        plan, length = self._plan(epoch), self.sequence_length
        i = int(np.searchsorted(plan.starts[stream], number, side="right")) - 1
        span = plan.spans[stream][i]
        sequences, first = int(plan.counts[stream][i]), int(plan.starts[stream][i])
        # Blocks of equal size (within one): a short last block would hardly be shuffled.
        blocks = -(-sequences // MAX_BLOCK)
        which = ((number - first + 1) * blocks - 1) // sequences
        low, high = which * sequences // blocks, (which + 1) * sequences // blocks
        shard, start = int(span[0]), self._first_token(epoch, span) + low * length
        return ShuffleBlock(
            epoch=epoch,
            first=first + low,
            shard=shard,
            start=start,
            stop=start + (high - low) * length + (not self.aligned),
            permutation=random_permutation(
                high - low, self.seed, RandomUse.BLOCK, epoch, shard, start
            ),
        )

    def _epoch_of(self, sequence: int) -> tuple[int, int]:
        """Return the epoch of a sequence, and its number in that epoch."""
        if sequence < self._start_epoch_sequences:
            return self._start_epoch, sequence
        epochs, number = divmod(sequence - self._start_epoch_sequences, self.sequences_per_epoch)
        return self._start_epoch + 1 + epochs, number

    # Spans (n, 3) are rows of (shard, start, stop): tokens of a shard to chunk into sequences.

    def _full_shards(self, shards: Int64Array | slice) -> Int64Array:
        numbers = np.arange(len(self._tokens))[shards]
        return np.stack([numbers, np.zeros_like(numbers), self._tokens[shards]], 1)

    def _is_full_shard(self, spans: Int64Array) -> NDArray[np.bool_]:
        return (spans[:, 1] == 0) & (spans[:, 2] == self._tokens[spans[:, 0]])

    def _count_sequences(self, spans: Int64Array) -> Int64Array:
        """Return the number of sequences of each span.

        A full shard has one fewer than would fit, so that the offset can be any of 0..L-1 and the
        number is the same in every epoch; a shard under 2 L tokens keeps its only sequence.
        """
        length, tokens = self.sequence_length, spans[:, 2] - spans[:, 1]
        if self.aligned:
            return tokens // length
        of_full_shard = np.maximum(tokens // length - 1, tokens > length)
        of_part = np.maximum(tokens - 1, 0) // length
        return np.where(self._is_full_shard(spans), of_full_shard, of_part)

    def _first_token(self, epoch: int, span: Int64Array) -> int:
        """Return the start of a span's first sequence: a random offset in a full shard."""
        if self.aligned or not self._is_full_shard(span[None])[0]:
            return int(span[1])
        sequences = self._count_sequences(span[None])[0]
        spare = int(span[2] - sequences * self.sequence_length)
        random = random_uint64(1, self.seed, RandomUse.OFFSET, epoch, int(span[0]))
        return int(random[0] % np.uint64(spare))

    def _make_plan(self, epoch: int) -> _EpochPlan:
        if epoch == self._start_epoch and self._remaining is not None:
            spans = self._remaining
        else:
            shards = random_permutation(len(self._tokens), self.seed, RandomUse.SHARDS, epoch)
            streams = assign_shards(shards, self._tokens, self.streams)
            spans = [self._full_shards(np.array(stream, np.int64)) for stream in streams]
        return _EpochPlan(spans, [self._count_sequences(part) for part in spans])

    def _remaining_spans(self, epoch: int, consumed: int, partly_served: bool) -> list[Int64Array]:
        """Return the spans of each stream not served by the first `consumed` sequences of an epoch.

        `partly_served`: include what is left of the shard that a stream is reading.
        """
        plan, remaining = self._plan(epoch), []
        for stream, served in enumerate(plan.consumed_by_stream(consumed)):
            spans, counts, starts = (x[stream] for x in (plan.spans, plan.counts, plan.starts))
            current = np.flatnonzero((starts < served) & (served < starts + counts))
            later = spans[(starts >= served) | (counts == 0)]
            if not partly_served:
                later = later[self._is_full_shard(later)]
            elif len(current):
                block = self.block(epoch, stream, int(served))
                rest = self._rest_of_span(block, served, spans[current])
                later = np.concatenate([rest, later])
            remaining.append(later)
        return remaining

    def _rest_of_span(self, block: ShuffleBlock, served: int, span: Int64Array) -> Int64Array:
        """Return what is left of a span (1, 3) of which `block` is partly served."""
        length, count = self.sequence_length, len(block.permutation)
        unserved = np.zeros(count + 1, np.int64)
        unserved[block.permutation[served - block.first :]] = 1
        unserved[count] = 1  # the tokens after the block
        edges = np.flatnonzero(np.diff(unserved, prepend=0, append=0))
        runs = np.stack([np.full(len(edges) // 2, block.shard), edges[::2], edges[1::2]], 1)
        runs[:, 1:] = block.start + runs[:, 1:] * length
        runs[:, 2] += 1
        runs[-1, 2] = span[0, 2]
        return runs


class _EpochPlan:
    """One epoch: the spans of each stream, and the order in which streams alternate."""

    def __init__(self, spans: list[Int64Array], counts: list[Int64Array]) -> None:
        self.spans, self.counts = spans, counts  # by stream: (n, 3), and the sequences of each
        self.starts = [np.cumsum(part) - part for part in counts]  # first sequence of each span
        self._lengths = np.array([part.sum() for part in counts], np.int64)
        self.sequences = int(self._lengths.sum())
        # A phase is a run of rounds with the same streams, up to the end of the shortest of them.
        # By phase: its first round, its streams, and the sequences served before it.
        self._rounds = np.concatenate([[0], np.unique(self._lengths)[:-1]])
        self._active = [np.flatnonzero(self._lengths > start) for start in self._rounds]
        self._served = np.array([np.minimum(self._lengths, r).sum() for r in self._rounds])

    def locate(self, sequences: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return (stream, number in the stream) of sequences of the epoch, given ascending."""
        phases = np.searchsorted(self._served, sequences, side="right") - 1
        streams, numbers = np.empty_like(sequences), np.empty_like(sequences)
        for phase in np.unique(phases):
            mask, active = phases == phase, self._active[phase]
            since = sequences[mask] - self._served[phase]
            streams[mask] = active[since % len(active)]
            numbers[mask] = self._rounds[phase] + since // len(active)
        return streams, numbers

    def consumed_by_stream(self, sequences: int) -> Int64Array:
        """Return how many of the first `sequences` of the epoch are from each stream."""
        phase = int(np.searchsorted(self._served, sequences, side="right")) - 1
        active = self._active[phase]
        counts = np.minimum(self._lengths, self._rounds[phase])
        if len(active):
            rounds, rest = divmod(sequences - int(self._served[phase]), len(active))
            counts[active] += rounds
            counts[active[:rest]] += 1
        return counts


def assign_shards(order: Int64Array, tokens: Int64Array, streams: int) -> list[list[int]]:
    """Assign shards, in this order, each to the stream with the fewest tokens so far.

    Streams then end within one shard of each other, whatever the sizes of the shards.
    """
    assigned: list[list[int]] = [[] for _ in range(streams)]
    heap = [(0, stream) for stream in range(streams)]
    for shard in order.tolist():
        total, stream = heapq.heappop(heap)
        assigned[stream].append(shard)
        heapq.heappush(heap, (total + int(tokens[shard]), stream))
    return assigned


def random_uint64(count: int, seed: int, *key: int) -> NDArray[np.uint64]:
    """Return random 64-bit integers (count,), the same for equal arguments on every machine.

    NumPy guarantees a stable stream for seed sequences and bit generators only, not for the
    methods built on them (`permutation`, `integers`), so none of these is used here.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key))
    return np.random.PCG64(sequence).random_raw(count)


def random_permutation(count: int, seed: int, *key: int) -> Int64Array:
    """Return a permutation of 0..count-1 drawn for the key."""
    return np.argsort(random_uint64(count, seed, *key), kind="stable").astype(np.int64)
