"""Process groups for tests: the processes start once and serve many jobs of any size.

A job is a function `job(*arguments)` at the top level of a module; it runs on every rank of a new
gloo process group and returns a picklable value. Importing torch and DeepSpeed takes several
seconds per process, creating a process group a few milliseconds.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch.multiprocessing as mp

TIMEOUT = 240  # seconds a job may take


class Worlds:
    """A pool of processes that form process groups of any size."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []
        self._results = self._context.Queue()
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a group of `size`; return its results by rank."""
        while len(self._workers) < size:
            inbox = self._context.Queue()
            process = self._context.Process(target=_serve, args=(inbox, self._results), daemon=True)
            process.start()
            self._workers.append((process, inbox))
        self._jobs += 1
        store = os.path.join(self._folder.name, f"store-{self._jobs}")
        for rank in range(size):
            self._workers[rank][1].put((rank, size, store, job, arguments))
        results: dict[int, Any] = {}
        while len(results) < size:
            try:
                rank, value, error = self._results.get(timeout=TIMEOUT)
            except Empty:
                self.close()
                raise TimeoutError(f"{job.__name__}: ranks {sorted(results)} of {size}") from None
            if error:
                self.close()  # the other ranks may wait for this one forever
                raise AssertionError(f"rank {rank} of {size} in {job.__name__}:\n{error}")
            results[rank] = value
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        """Kill all processes; the next run starts new ones."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers, self._results = [], self._context.Queue()


def _serve(inbox: Any, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        rank, size, store, job, arguments = inbox.get()
        try:
            value, error = _run(rank, size, store, job, arguments), ""
        except BaseException:
            value, error = None, traceback.format_exc()
        results.put((rank, value, error))


def _run(rank: int, size: int, store: str, job: Callable[..., Any], arguments: Any) -> Any:
    import logging

    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    import deepspeed
    import torch
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    linear = torch.nn.functional.linear
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    groups.mpu = None  # DeepSpeed keeps that of the last engine
    try:
        with open(os.devnull, "w") as devnull:
            from contextlib import redirect_stdout

            with redirect_stdout(devnull):  # DeepSpeed prints its configuration
                return job(*arguments)
    finally:
        from hg_scale.parallel.mesh import forget_groups

        forget_groups()
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        elif dist.is_initialized():
            dist.destroy_process_group()
        else:  # the job destroyed it, as `train.py` does at its end
            groups._release_process_group_references(group=None)
        # ZeRO-3 replaces it permanently; with and without it gradients are reduced in other orders.
        torch.nn.functional.linear = linear
        # DeepSpeed numbers parameters and modules per process, and compares them between ranks.
        Init.param_id = 0
        count: Any = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
        count[0][0] = 0
