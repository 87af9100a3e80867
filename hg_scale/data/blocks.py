"""Readers of blocks: in this process, or in worker processes."""

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
from hg_scale.data.shards import LoadedTokens, RetryPolicy, ShardFile, ShardReader


class BlockRequest(NamedTuple):
    """Tokens [start, stop) of a shard. The requests of a slot read each shard front to back."""

    slot: tuple[int, int]  # source and stream
    file: ShardFile
    start: int
    stop: int


class BlockReader(Protocol):
    """Serves one request at a time; `close` also aborts a read in another thread."""

    def read(self, request: BlockRequest) -> LoadedTokens: ...

    def close(self) -> None: ...


class LocalReader:
    """Reads blocks in this process. Keeps the last shard of each slot open for its next block."""

    def __init__(self, retry_policy: RetryPolicy) -> None:
        self._retry_policy, self._closing = retry_policy, threading.Event()
        self._open: dict[tuple[int, int], ShardReader] = {}

    def read(self, request: BlockRequest) -> LoadedTokens:
        """Return the tokens of a block, and which of them cannot be used."""
        reader = self._open.get(request.slot)
        if reader is None or reader.file.url != request.file.url:
            if reader is not None:
                reader.close()
            reader = ShardReader(request.file, self._retry_policy, self._closing)
            self._open[request.slot] = reader
        return reader.load(request.start, request.stop)

    def close(self) -> None:
        """Abort reads in progress."""
        self._closing.set()
        for reader in list(self._open.values()):
            reader.abort()


class WorkerReader:
    """Reads blocks in a process of its own, which imports no torch and ends with its parent.

    The process is spawned, since a fork would copy the locks of CUDA's and gloo's threads.
    """

    def __init__(self, number: int, retry_policy: RetryPolicy) -> None:
        context = multiprocessing.get_context("spawn")
        self._name, self._lock = f"data worker {number}", threading.Lock()
        self._connection, worker_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(worker_end, retry_policy), name=self._name, daemon=True
        )
        self._process.start()
        worker_end.close()

    def read(self, request: BlockRequest) -> LoadedTokens:
        """As `LocalReader.read`. Raises DataError where the process died."""
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
        """Kill the process; it holds nothing that needs saving."""
        self._process.kill()
        self._process.join()


def make_readers(workers: int, retry_policy: RetryPolicy) -> Sequence[BlockReader]:
    """Return readers in `workers` processes, or for 0 one reader in this process."""
    if not workers:
        return [LocalReader(retry_policy)]
    return [WorkerReader(number, retry_policy) for number in range(workers)]


def _serve(connection: Connection, retry_policy: RetryPolicy) -> None:
    """Main loop of a worker: answer requests until the parent closes the connection."""
    # Ctrl-C reaches the whole process group, and Slurm signals every process of a job; only the
    # parent reacts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # webdataset works without it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    reader = LocalReader(retry_policy)
    with contextlib.suppress(EOFError, OSError):  # the parent closed the connection
        while True:
            request = connection.recv()
            try:
                answer: LoadedTokens | str = reader.read(request)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


def _exit_with_parent() -> None:
    """Exit as soon as the parent ends, even killed, and even during a read."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
