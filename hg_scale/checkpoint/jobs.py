"""Map a function over many tensors or files, in this process or in a pool of processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from hg_scale.checkpoint.errors import CheckpointError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_QUEUED = 4  # items submitted per process before the first result is awaited


class ProgressReporter(Protocol):
    """Receives progress; `hg_scale.data.progress.ProgressBar` implements it."""

    def begin(self, what: str, total: int | None) -> None: ...

    def advance(self, count: int) -> None: ...


def run_jobs(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int = 1
) -> Iterator[tuple[_Item, _Result]]:
    """Yield (item, work(item)) in order. `work` is pickled once per process, not per item.

    Raises what `work` raises, and CheckpointError if a process dies.
    """
    if workers <= 1:
        for item in items:
            yield item, work(item)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_init_worker, initargs=(work,)
    )
    pending: deque[tuple[_Item, Future[_Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(_run, item)))
            if len(pending) >= _QUEUED * workers:
                yield _pop_result(pending)
        while pending:
            yield _pop_result(pending)
    except BrokenProcessPool:
        raise CheckpointError(
            "a worker process died (out of memory?); try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pop_result(pending: deque[tuple[_Item, Future[_Result]]]) -> tuple[_Item, _Result]:
    item, future = pending.popleft()
    return item, future.result()


_work: Callable[[Any], Any]


def _init_worker(work: Callable[[Any], Any]) -> None:
    import torch

    global _work
    _work = work
    torch.set_num_threads(1)  # parallelism comes from the processes


def _run(item: Any) -> Any:
    return _work(item)
