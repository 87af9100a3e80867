"""The training stream of one data-parallel rank: its rows of every global batch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.blocks import BlockSource, Request
from hg_scale.data.errors import DataError
from hg_scale.data.order import MAX_BLOCK, MAX_STREAMS, Ints, ShuffleBlock
from hg_scale.data.prefetch import BlockKey, BlockLoader
from hg_scale.data.schedule import DataSchedule, Places
from hg_scale.data.shards import Loaded, ShardFile
from hg_scale.data.tokenizer import token_dtype

NO_TOKEN = -1  # what the rows of a window that cannot be used hold
_PLANNED = MAX_STREAMS * MAX_BLOCK  # windows planned at once: about a block of every stream


@dataclass(frozen=True)
class Batch:
    """A rank's rows: ids (rows, L + 1) int64; inputs are `[:, :-1]`, labels `[:, 1:]`.

    `faults`: by row, why it is all NO_TOKEN. `waited`: seconds spent waiting for the data.
    """

    ids: NDArray[np.int64]
    faults: dict[int, str]
    waited: float


@dataclass
class _Plan:
    """Some batches to come: of every row its block and the window in it."""

    blocks: list[BlockKey]
    which: Ints  # (batches, rows), into `blocks`
    windows: Ints  # (batches, rows)
    served: int = 0  # batches


class TrainingStream:
    """Batches of training windows, the same global batches for every number of ranks.

    A global batch is the next `global_batch_size` windows of the schedule, with the rows of a
    stream side by side: the contiguous rows of a rank then come from few streams, and it reads
    those alone. Blocks are loaded ahead of need, up to `prefetch_bytes` of them (but always those
    of the next batches); neither that nor the number of readers changes a batch.
    """

    def __init__(
        self,
        schedule: DataSchedule,
        readers: Sequence[BlockSource],
        *,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        batches: int | None = None,
        prefetch_bytes: int = 1 << 26,
    ) -> None:
        """Owns the readers; `batches` is how many there will be, where that is known.

        Raises DataError where the batch does not divide among the ranks.
        """
        if global_batch_size % data_size:
            raise DataError(
                f"global_batch_size {global_batch_size} does not divide among {data_size} "
                "data-parallel ranks: choose a multiple"
            )
        rows = global_batch_size // data_size
        self._mine = slice(data_rank * rows, (data_rank + 1) * rows)
        self._schedule, self._global_rows, self._left = schedule, global_batch_size, batches
        # By source: the input before a window that is a document, or None where windows are cut.
        length, sources = schedule.sequence_length, schedule.sources
        self._starts = [s.start if s.aligned(length) else None for s in sources]
        self._planned = schedule.begin  # the first window not planned yet
        self._plans: deque[_Plan] = deque()
        self._users: Counter[BlockKey] = Counter()  # plans that need a block
        self._loader, self._limit = BlockLoader(readers), prefetch_bytes

    def next_batch(self) -> Batch:
        """This rank's rows of the next global batch.

        Raises DataError where the data ends, or a reader died.
        """
        # Not more at once: reading far ahead must not hold up the first batch.
        for _ in range(2):
            if len(self._plans) < 2 or self._loader.held < self._limit:
                self._plan()
        if not self._plans:
            self._schedule.places(self._planned, self._global_rows)  # says where the data ends
            raise DataError("there are no more batches: more were asked for than were announced")
        plan = self._plans[0]
        batch = self._gather(plan)
        plan.served += 1
        if plan.served == len(plan.which):
            self._plans.popleft()
            self._release(plan)
        return batch

    def close(self) -> None:
        """End the readers; may be called more than once."""
        self._loader.close()

    def __enter__(self) -> TrainingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, plan: _Plan) -> Batch:
        """The next batch of a plan, once its blocks are there."""
        length = self._schedule.sequence_length
        which, starts = plan.which[plan.served], plan.windows[plan.served] * length
        ids = np.empty((len(which), length + 1), np.int64)
        blocks: dict[int, Loaded] = {}
        faults: dict[int, str] = {}
        waited = 0.0
        for row, (number, start) in enumerate(zip(which.tolist(), starts.tolist(), strict=True)):
            key = plan.blocks[number]
            if number not in blocks:
                blocks[number], seconds = self._loader.get(key)
                waited += seconds
            block, first = blocks[number], self._starts[key.source]
            if first is None:
                stop = start + length + 1
                ids[row] = block.tokens[start:stop]
            else:
                stop = start + length
                ids[row, 0], ids[row, 1:] = first, block.tokens[start:stop]
            for fault in block.faults:
                if start < fault.stop and stop > fault.start:
                    faults[row], ids[row] = fault.message, NO_TOKEN
        return Batch(ids, faults, waited)

    def _plan(self) -> None:
        """Plan the batches that follow, and ask for their blocks."""
        size, end = self._global_rows, self._schedule.windows
        batches = max(1, _PLANNED // size)
        if end is not None:
            batches = min(batches, (end - self._planned) // size)
        if self._left is not None:
            batches = min(batches, self._left)
            self._left -= batches
        if not batches:
            return
        places = self._schedule.places(self._planned, batches * size)
        mine = rows_of(places, size)[:, self._mine]
        self._planned += batches * size
        plan = _Plan([], np.empty(mine.shape, np.int64), np.empty(mine.shape, np.int64))
        flat = Places(*(part[mine.ravel()] for part in places))
        found = self._blocks_of(flat, plan.which.reshape(-1), plan.windows.reshape(-1))
        for _, key, block in sorted(found, key=lambda item: item[0]):
            if not self._users[key]:
                self._ask(key, block)
        plan.blocks = [key for _, key, _ in found]
        self._users.update(plan.blocks)
        self._plans.append(plan)

    def _blocks_of(
        self, places: Places, which: Ints, windows: Ints
    ) -> list[tuple[int, BlockKey, ShuffleBlock]]:
        """The blocks of these windows, each with the first place that uses it.

        Fills in, for every place, `which` block and which of the `windows` in it.
        """
        found: list[tuple[int, BlockKey, ShuffleBlock]] = []
        slots = places.source * MAX_STREAMS + places.stream
        slots += places.epoch * len(self._schedule.sources) * MAX_STREAMS
        for slot in np.unique(slots):
            here = np.flatnonzero(slots == slot)
            numbers = places.number[here]  # ascending
            source, epoch, stream = (int(part[here[0]]) for part in places[:3])
            begin = 0
            while begin < len(here):
                block = self._schedule.orders[source].block(epoch, stream, int(numbers[begin]))
                end = int(np.searchsorted(numbers, block.first + len(block.windows)))
                taken = here[begin:end]
                which[taken] = len(found)
                windows[taken] = block.windows[numbers[begin:end] - block.first]
                key = BlockKey(source, epoch, stream, block.first)
                found.append((int(taken[0]), key, block))
                begin = end
        return found

    def _ask(self, key: BlockKey, block: ShuffleBlock) -> None:
        index = self._schedule.sources[key.source].index
        file = ShardFile.of(index, index.split("train").shards[block.shard])
        request = Request((key.source, key.stream), file, block.start, block.stop)
        size = (block.stop - block.start) * token_dtype(index.vocab_size).itemsize
        self._loader.ask(key, request, size)

    def _release(self, plan: _Plan) -> None:
        self._users.subtract(plan.blocks)
        for key in plan.blocks:
            if not self._users[key]:
                del self._users[key]
                self._loader.drop(key)


def rows_of(places: Places, batch_size: int) -> Ints:
    """Which of the windows `places` each row of their global batches has, (batches, batch_size).

    Within a batch, rows of the same source and stream stand side by side.
    """
    slots = (places.source * MAX_STREAMS + places.stream).reshape(-1, batch_size)
    begins = np.arange(len(slots))[:, None] * batch_size
    return begins + np.argsort(slots, axis=1, kind="stable")
