"""Reading ahead of the training loop, in one background thread."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.stream import TrainingStream


@dataclass(frozen=True)
class _Item:
    batch: NDArray[np.int64]
    position: int
    epoch: int


class Prefetcher:
    """Keeps up to `depth` batches of a stream ready.

    `position` and `epoch` count the batches handed out, not those read ahead: they are what a
    checkpoint stores.
    """

    def __init__(self, stream: TrainingStream, *, depth: int) -> None:
        self.position, self.epoch = stream.position, stream.epoch
        self._stream = stream
        self._items: queue.Queue[_Item | BaseException] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True)
        self._thread.start()

    def next(self) -> tuple[NDArray[np.int64], float]:
        """The next batch and the seconds that the caller waited for it.

        What went wrong while reading is raised here, once the batches before it are served.
        """
        if self._stop.is_set():
            raise RuntimeError("the prefetcher is closed")
        if self._error is not None:
            raise self._error
        start = time.perf_counter()
        item = self._items.get()
        waited = time.perf_counter() - start
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self.position, self.epoch = item.position, item.epoch
        return item.batch, waited

    def close(self) -> None:
        """Stop the thread and wait until it is gone. May be called more than once."""
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room in the queue
            try:
                self._items.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                batch = self._stream.next_batch()
                self._items.put(_Item(batch, self._stream.position, self._stream.epoch))
        except BaseException as error:  # noqa: B036 - raised again in the caller
            self._items.put(error)
