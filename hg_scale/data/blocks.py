"""Who reads blocks: a reader in this process, or the same in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, Protocol

from hg_scale.data.errors import DataError
from hg_scale.data.shards import Loaded, RetryPolicy, ShardFile, ShardReader


class Request(NamedTuple):
    """Tokens [start, stop) of a shard. What one slot asks for, it asks for front to back."""

    slot: tuple[int, int]  # source and stream
    file: ShardFile
    start: int
    stop: int


class BlockSource(Protocol):
    """Serves one request at a time; `close` also ends a read that another thread waits in."""

    def read(self, request: Request) -> Loaded: ...

    def close(self) -> None: ...


class BlockReader:
    """Reads blocks here. Keeps the last shard of each slot open: its blocks follow each other."""

    def __init__(self, patience: RetryPolicy) -> None:
        self._patience, self._closing = patience, threading.Event()
        self._open: dict[tuple[int, int], ShardReader] = {}

    def read(self, request: Request) -> Loaded:
        """The tokens of a block, with what of them cannot be used."""
        reader = self._open.get(request.slot)
        if reader is None or reader.file.url != request.file.url:
            if reader is not None:
                reader.close()
            reader = ShardReader(request.file, self._patience, self._closing)
            self._open[request.slot] = reader
        return reader.load(request.start, request.stop)

    def close(self) -> None:
        """Give up what is being read."""
        self._closing.set()
        for reader in list(self._open.values()):
            reader.kill()


class Worker:
    """A process that reads blocks. It imports no torch, and ends with its parent.

    It is started afresh (spawn), since a fork would copy the locks of CUDA's and gloo's threads.
    """

    def __init__(self, number: int, patience: RetryPolicy) -> None:
        context = multiprocessing.get_context("spawn")
        self._name, self._lock = f"data worker {number}", threading.Lock()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, patience), name=self._name, daemon=True
        )
        self._process.start()
        theirs.close()

    def read(self, request: Request) -> Loaded:
        """As `BlockReader.read`. Raises DataError where the process died."""
        try:
            with self._lock:
                self._connection.send(request)
                answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise DataError(
                f"{self._name} (process {self._process.pid}) died with exit code "
                f"{self._process.exitcode}, out of memory or killed; start again, or use "
                "data.workers 0"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self._name} failed:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process; it has nothing to lose."""
        self._process.kill()
        self._process.join()


def make_readers(workers: int, patience: RetryPolicy) -> Sequence[BlockSource]:
    """`workers` processes, or one reader in this process for 0."""
    if not workers:
        return [BlockReader(patience)]
    return [Worker(number, patience) for number in range(workers)]


def _serve(connection: Connection, patience: RetryPolicy) -> None:
    """The life of a worker: answer requests until the parent is gone."""
    # Ctrl-C reaches the whole group, and Slurm signals every process of a job; the parent acts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # webdataset does without it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reader = BlockReader(patience)
    with contextlib.suppress(EOFError, OSError):  # the parent closed
        while True:
            request = connection.recv()
            try:
                answer: Loaded | str = reader.read(request)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


def _end_with_parent() -> None:
    """End at once with the parent, even killed, and even in the middle of a read."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
