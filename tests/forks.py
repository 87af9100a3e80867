"""Worlds of processes that may die: forked, in milliseconds, off one that has imported all.

Unlike `tests.world`, whose processes live on from job to job, each serves one job. A rank can be
told to kill itself (`die_at`), or be killed from outside.
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
    """Starts worlds of forked processes."""

    def __init__(self, *modules: str) -> None:
        """`modules` are imported once, by the process that the others are forked off."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        self._folder = tempfile.TemporaryDirectory()
        self._worlds = 0

    def start(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a gloo world; its processes by rank."""
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
        """As `start`, to the end: exit codes by rank."""
        return finish(self.start(size, job, *arguments))


def finish(processes: list[Any], seconds: float = 60) -> list[int]:
    """Wait for all to end, by themselves; exit codes by rank.

    Those that do not are aborted, so that `faulthandler` shows where each of their threads is.
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
    assert not hanging, f"ranks {hanging} of {len(processes)} do not end"
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


def die_at(moment: int, part: str) -> None:
    """Kill this process before its `moment`-th operation on files with `part` in their path.

    Removals are given relative paths, so each of them counts from the first such operation on.
    """
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        removal = seen > 0 and event in ("os.remove", "os.rmdir")
        if event in _OPERATIONS and (removal or any(part in str(a) for a in arguments[:2])):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
