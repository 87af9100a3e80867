"""The training stream of one data-parallel rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.order import Block, WindowOrder
from hg_scale.data.shards import ShardReader


class TrainingStream:
    """Batches of training windows, the same global batches for every number of ranks.

    A global batch is the next `global_batch_size` windows of `WindowOrder`, with the rows of a
    stream side by side: the contiguous rows of a rank then come from few streams, and it reads
    those alone. Resuming needs one number, the position.
    """

    def __init__(
        self,
        index: Index,
        *,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        position: int = 0,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        """`position` is the number of tokens consumed so far, over all ranks.

        Raises DataError where the batch does not divide or no window fits into a shard.
        """
        if global_batch_size % data_size:
            raise DataError(
                f"global_batch_size {global_batch_size} does not divide among {data_size} "
                "data-parallel ranks: choose a multiple"
            )
        if position < 0:
            raise DataError(f"the data position is {position}: expected 0 or more tokens")
        shards = index.split("train").shards
        self._order = WindowOrder(
            [shard.tokens for shard in shards], sequence_length=sequence_length, seed=seed
        )
        self._readers = [_StreamReader(index, self._order, s) for s in range(self._order.streams)]
        self._global_rows, rows = global_batch_size, global_batch_size // data_size
        self._rows = slice(data_rank * rows, (data_rank + 1) * rows)
        self._length = sequence_length
        self.position = position

    @property
    def epoch(self) -> int:
        """The epoch of the next window, from 0."""
        return self.position // self._length // self._order.windows_per_epoch

    @property
    def windows_per_epoch(self) -> int:
        return self._order.windows_per_epoch

    def next_batch(self) -> NDArray[np.int64]:
        """This rank's rows of the next global batch, (global_batch_size / data_size, L + 1).

        Inputs are `[:, :-1]`, labels `[:, 1:]`. Raises DataError where a shard cannot be read; the
        position then stays.
        """
        first = self.position // self._length
        epochs, streams, numbers = self._order.turns(first, self._global_rows)
        mine = np.argsort(streams, kind="stable")[self._rows]
        batch = np.empty((len(mine), self._length + 1), np.int64)
        for row, place in zip(batch, mine, strict=True):
            reader = self._readers[streams[place]]
            row[:] = reader.window(int(epochs[place]), int(numbers[place]))
        self.position += self._global_rows * self._length
        return batch


class _StreamReader:
    """The windows of one canonical stream: holds the tokens of the block it is in."""

    def __init__(self, index: Index, order: WindowOrder, stream: int) -> None:
        self._index, self._order, self._stream = index, order, stream
        self._block: Block | None = None
        self._tokens: NDArray[Any]
        self._shard: tuple[int, int] | None = None  # epoch and number of the open shard
        self._reader: ShardReader

    def window(self, epoch: int, number: int) -> NDArray[Any]:
        """The L + 1 tokens of the window `number` of the stream in an epoch."""
        if self._block is None or (epoch, number) not in self._block:
            self._load(self._order.block(epoch, self._stream, number))
        assert self._block is not None
        length = self._order.sequence_length
        start = int(self._block.windows[number - self._block.first]) * length
        return self._tokens[start : start + length + 1]

    def _load(self, block: Block) -> None:
        if self._shard != (block.epoch, block.shard):
            shard = self._index.split("train").shards[block.shard]
            self._reader = ShardReader(self._index, shard)
            self._shard = (block.epoch, block.shard)
        stop = block.start + len(block.windows) * self._order.sequence_length + 1
        self._tokens = self._reader.read(block.start, stop)
        self._block = block
