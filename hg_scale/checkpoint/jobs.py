"""Work on many tensors: in this process, or spread over several."""

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

_AHEAD = 4  # items handed to each process before the first result is asked for


class ProgressReporter(Protocol):
    """Where progress goes; `hg_scale.data.progress.ProgressBar` is one."""

    def begin(self, what: str, total: int | None) -> None: ...

    def advance(self, count: int) -> None: ...


def run_jobs(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int = 1
) -> Iterator[tuple[_Item, _Result]]:
    """Each item with what `work` makes of it, in order; `work` is sent to every process once.

    Raises what `work` raises, CheckpointError where a process dies.
    """
    if workers <= 1:
        for item in items:
            yield item, work(item)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(work,)
    )
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_run, item)))
            if len(waiting) >= _AHEAD * workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    except BrokenProcessPool:
        raise CheckpointError(
            "a worker process died (out of memory?); try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[_Item, Future[_Result]]]) -> tuple[_Item, _Result]:
    item, future = waiting.popleft()
    return item, future.result()


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    import torch

    global _work
    _work = work
    torch.set_num_threads(1)  # the processes are what runs in parallel


def _run(item: Any) -> Any:
    return _work(item)
