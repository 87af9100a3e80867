"""Reading ahead of need: blocks are loaded in the background, one thread a reader."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from hg_scale.data.blocks import BlockSource, Request
from hg_scale.data.shards import Loaded


class BlockKey(NamedTuple):
    """The block of a source whose first window is the `first` of a stream in an epoch."""

    source: int
    epoch: int
    stream: int
    first: int


class BlockLoader:
    """Loads the blocks asked for in the order asked; a slot stays with one reader.

    `held` counts the bytes of all blocks asked for and not dropped yet.
    """

    def __init__(self, readers: Sequence[BlockSource]) -> None:
        self.held = 0
        self._readers = readers
        self._threads = [ThreadPoolExecutor(1, "data-reader") for _ in readers]
        self._homes: dict[tuple[int, int], int] = {}  # slots are dealt out as they appear
        self._blocks: dict[BlockKey, tuple[Future[Loaded], int]] = {}

    def ask(self, key: BlockKey, request: Request, size: int) -> None:
        """Have a block of `size` bytes loaded."""
        home = self._homes.setdefault(request.slot, len(self._homes) % len(self._readers))
        future = self._threads[home].submit(self._readers[home].read, request)
        self._blocks[key] = future, size
        self.held += size

    def get(self, key: BlockKey) -> tuple[Loaded, float]:
        """A block, and the seconds waited for it. What its reader raised is raised here."""
        future, _ = self._blocks[key]
        if future.done():
            return future.result(), 0.0
        start = time.perf_counter()
        return future.result(), time.perf_counter() - start

    def drop(self, key: BlockKey) -> None:
        """A block is not needed any more."""
        self.held -= self._blocks.pop(key)[1]

    def close(self) -> None:
        """End the readers and their threads; may be called more than once."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()
        for thread in self._threads:
            thread.shutdown(wait=True)
        self._blocks.clear()
