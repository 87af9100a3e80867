"""Process groups whose ranks may be killed, forked in milliseconds from a preloaded process.

Unlike the processes of `tests.world`, which are reused, each runs one job. A rank can kill itself
at a chosen file operation (`die_at`) or be killed from outside.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

KILLED = -signal.SIGKILL
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Forks:
    """Starts gloo process groups of forked processes."""

    def __init__(self, *modules: str) -> None:
        """`modules` are imported once, in the fork server."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        self._folder = tempfile.TemporaryDirectory()
        self._worlds = 0

    def start(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a group of `size`; return its processes."""
        self._worlds += 1
        store = os.path.join(self._folder.name, f"store-{self._worlds}")
        processes = [
            self._context.Process(target=_serve, args=(rank, size, store, job, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        return processes

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[int]:
        """Like `start`, but wait and return the exit codes by rank."""
        return finish(self.start(size, job, *arguments))


def finish(processes: list[Any], seconds: float = 60) -> list[int]:
    """Wait until all processes have exited; return the exit codes by rank.

    Processes that hang are aborted, so that `faulthandler` prints the stacks of their threads.
    """
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        os.kill(processes[rank].pid, signal.SIGABRT)
        processes[rank].join(5)
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} of {len(processes)} hang"
    return [process.exitcode for process in processes]


def _serve(rank: int, size: int, store: str, job: Callable[..., Any], arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    job(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def die_at(moment: int, part: str, removals: bool = True) -> None:
    """Kill this process before its `moment`-th operation on files with `part` in their path.

    Removals of folders get relative paths, so with `removals` all removals count once the first
    such operation was seen.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        removal = removals and count > 0 and event in ("os.remove", "os.rmdir")
        if event in _OPERATIONS and (removal or any(part in str(a) for a in arguments[:2])):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
