"""The training stream of one data-parallel rank: its sequences of every global batch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.blocks import BlockReader, BlockRequest
from hg_scale.data.errors import DataError
from hg_scale.data.order import MAX_BLOCK, MAX_STREAMS, Int64Array, ShuffleBlock
from hg_scale.data.prefetch import BlockKey, BlockLoader
from hg_scale.data.sequence_schedule import DataSchedule, SequenceLocations
from hg_scale.data.shards import LoadedTokens, ShardFile
from hg_scale.data.tokenizer import token_dtype

NO_TOKEN = -1  # the ids of a sequence that cannot be used
_PLANNED = MAX_STREAMS * MAX_BLOCK  # sequences planned at once: about a block of every stream


@dataclass(frozen=True)
class Batch:
    """A rank's sequences: ids (B, L + 1) int64; inputs are `[:, :-1]`, labels `[:, 1:]`.

    `errors`: by index in the batch, why that sequence is all NO_TOKEN. `wait_seconds`: time spent
    waiting for the data.
    """

    ids: NDArray[np.int64]
    errors: dict[int, str]
    wait_seconds: float


@dataclass
class _Plan:
    """Some batches ahead: the block of every sequence, and its number in that block."""

    blocks: list[BlockKey]
    which: Int64Array  # (batches, B), indices into `blocks`
    numbers: Int64Array  # (batches, B), in units of the sequence length from the block's start
    served: int = 0  # batches


class TrainingStream:
    """Batches of training sequences; the global batches do not depend on the number of ranks.

    A global batch is the next `global_batch_size` sequences of the schedule, sorted by stream: the
    contiguous slice of a rank then is from few streams, and a rank reads only those. Blocks are
    loaded ahead, up to `prefetch_bytes` (and always those of the next batches); neither that nor
    the number of readers changes a batch.
    """

    def __init__(
        self,
        schedule: DataSchedule,
        readers: Sequence[BlockReader],
        *,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        batches: int | None = None,
        prefetch_bytes: int = 1 << 26,
    ) -> None:
        """The stream closes the readers. `batches`: how many will be read; None if not known.

        Raises DataError where the batch does not divide among the ranks.
        """
        if global_batch_size % data_size:
            raise DataError(
                f"global_batch_size {global_batch_size} does not divide among {data_size} "
                "data-parallel ranks: choose a multiple"
            )
        size = global_batch_size // data_size
        self._rank_slice = slice(data_rank * size, (data_rank + 1) * size)
        self._schedule, self._global_batch_size = schedule, global_batch_size
        self._batches_left = batches
        # By source: the first input of a sequence that is a document; None where text is chunked.
        length, sources = schedule.sequence_length, schedule.sources
        self._start_tokens = [s.start_token if s.is_aligned(length) else None for s in sources]
        self._planned = schedule.first_sequence  # the first sequence not planned yet
        self._plans: deque[_Plan] = deque()
        self._users: Counter[BlockKey] = Counter()  # plans that need a block
        self._loader, self._limit = BlockLoader(readers), prefetch_bytes

    def next_batch(self) -> Batch:
        """Return this rank's sequences of the next global batch.

        Raises DataError where the data ends, or a reader died.
        """
        # At most two plans per call: reading far ahead must not delay the first batch.
        for _ in range(2):
            if len(self._plans) < 2 or self._loader.bytes_held < self._limit:
                self._plan()
        if not self._plans:
            # Raises where the data ends; otherwise more batches are read than were announced.
            self._schedule.locate(self._planned, self._global_batch_size)
            raise DataError("no more batches: more were read than the stream was opened for")
        plan = self._plans[0]
        batch = self._gather(plan)
        plan.served += 1
        if plan.served == len(plan.which):
            self._plans.popleft()
            self._release(plan)
        return batch

    def close(self) -> None:
        """Close the readers; may be called more than once."""
        self._loader.close()

    def __enter__(self) -> TrainingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, plan: _Plan) -> Batch:
        """Return the next batch of a plan, waiting for its blocks."""
        length = self._schedule.sequence_length
        which, starts = plan.which[plan.served], plan.numbers[plan.served] * length
        ids = np.empty((len(which), length + 1), np.int64)
        blocks: dict[int, LoadedTokens] = {}
        errors: dict[int, str] = {}
        waited = 0.0
        for i, (number, start) in enumerate(zip(which.tolist(), starts.tolist(), strict=True)):
            key = plan.blocks[number]
            if number not in blocks:
                blocks[number], seconds = self._loader.get(key)
                waited += seconds
            block, start_token = blocks[number], self._start_tokens[key.source]
            if start_token is None:
                stop = start + length + 1
                ids[i] = block.tokens[start:stop]
            else:
                stop = start + length
                ids[i, 0], ids[i, 1:] = start_token, block.tokens[start:stop]
            for span in block.unusable:
                if start < span.stop and stop > span.start:
                    errors[i], ids[i] = span.message, NO_TOKEN
        return Batch(ids, errors, waited)

    def _plan(self) -> None:
        """Plan the next batches and request their blocks."""
        size, end = self._global_batch_size, self._schedule.sequences
        batches = max(1, _PLANNED // size)
        if end is not None:
            batches = min(batches, (end - self._planned) // size)
        if self._batches_left is not None:
            batches = min(batches, self._batches_left)
            self._batches_left -= batches
        if not batches:
            return
        locations = self._schedule.locate(self._planned, batches * size)
        selected = batch_indices(locations, size)[:, self._rank_slice]
        self._planned += batches * size
        plan = _Plan([], np.empty(selected.shape, np.int64), np.empty(selected.shape, np.int64))
        flat = SequenceLocations(*(part[selected.ravel()] for part in locations))
        found = self._find_blocks(flat, plan.which.reshape(-1), plan.numbers.reshape(-1))
        for _, key, block in sorted(found, key=lambda item: item[0]):
            if not self._users[key]:
                self._request(key, block)
        plan.blocks = [key for _, key, _ in found]
        self._users.update(plan.blocks)
        self._plans.append(plan)

    def _find_blocks(
        self, locations: SequenceLocations, which: Int64Array, numbers: Int64Array
    ) -> list[tuple[int, BlockKey, ShuffleBlock]]:
        """Return the blocks of these sequences, each with the index of the first one in it.

        Fills in, for every sequence, `which` block it is in and its number there.
        """
        found: list[tuple[int, BlockKey, ShuffleBlock]] = []
        slots = locations.source * MAX_STREAMS + locations.stream
        slots += locations.epoch * len(self._schedule.sources) * MAX_STREAMS
        for slot in np.unique(slots):
            indices = np.flatnonzero(slots == slot)
            in_stream = locations.number[indices]  # ascending
            source, epoch, stream = (int(part[indices[0]]) for part in locations[:3])
            start = 0
            while start < len(indices):
                block = self._schedule.orders[source].block(epoch, stream, int(in_stream[start]))
                stop = int(np.searchsorted(in_stream, block.first + len(block.permutation)))
                members = indices[start:stop]
                which[members] = len(found)
                numbers[members] = block.permutation[in_stream[start:stop] - block.first]
                key = BlockKey(source, epoch, stream, block.first)
                found.append((int(members[0]), key, block))
                start = stop
        return found

    def _request(self, key: BlockKey, block: ShuffleBlock) -> None:
        index = self._schedule.sources[key.source].index
        file = ShardFile.from_index(index, index.split("train").shards[block.shard])
        request = BlockRequest((key.source, key.stream), file, block.start, block.stop)
        size = (block.stop - block.start) * token_dtype(index.vocab_size).itemsize
        self._loader.request(key, request, size)

    def _release(self, plan: _Plan) -> None:
        self._users.subtract(plan.blocks)
        for key in plan.blocks:
            if not self._users[key]:
                del self._users[key]
                self._loader.drop(key)


def batch_indices(locations: SequenceLocations, batch_size: int) -> Int64Array:
    """Return the order of the sequences within their global batches: (batches, batch_size).

    Entries are indices into `locations`. Within a batch, sequences of the same source and stream
    are adjacent.
    """
    slots = (locations.source * MAX_STREAMS + locations.stream).reshape(-1, batch_size)
    starts = np.arange(len(slots))[:, None] * batch_size
    return starts + np.argsort(slots, axis=1, kind="stable")
