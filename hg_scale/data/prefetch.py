"""Prefetching: blocks are loaded in the background, by one thread per reader."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from hg_scale.data.blocks import BlockReader, BlockRequest
from hg_scale.data.shards import LoadedTokens


class BlockKey(NamedTuple):
    """Identifies a block: its source, and the stream, epoch and number of its first sequence."""

    source: int
    epoch: int
    stream: int
    first: int


class BlockLoader:
    """Loads blocks in the order of their requests; each slot stays with one reader.

    `bytes_held` counts all blocks requested and not dropped yet.
    """

    def __init__(self, readers: Sequence[BlockReader]) -> None:
        self.bytes_held = 0
        self._readers = readers
        self._threads = [ThreadPoolExecutor(1, "data-reader") for _ in readers]
        self._reader_of: dict[tuple[int, int], int] = {}  # by slot, round-robin as slots appear
        self._blocks: dict[BlockKey, tuple[Future[LoadedTokens], int]] = {}

    def request(self, key: BlockKey, request: BlockRequest, size: int) -> None:
        """Start loading a block of `size` bytes."""
        number = self._reader_of.setdefault(request.slot, len(self._reader_of) % len(self._readers))
        future = self._threads[number].submit(self._readers[number].read, request)
        self._blocks[key] = future, size
        self.bytes_held += size

    def get(self, key: BlockKey) -> tuple[LoadedTokens, float]:
        """Return a block, and the seconds waited for it. Raises what its reader raised."""
        future, _ = self._blocks[key]
        if future.done():
            return future.result(), 0.0
        start = time.perf_counter()
        return future.result(), time.perf_counter() - start

    def drop(self, key: BlockKey) -> None:
        """Free a block that is no longer needed."""
        self.bytes_held -= self._blocks.pop(key)[1]

    def close(self) -> None:
        """Close the readers and end their threads; may be called more than once."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()
        for thread in self._threads:
            thread.shutdown(wait=True)
        self._blocks.clear()
