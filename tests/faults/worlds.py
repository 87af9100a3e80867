"""Runs with an injected fault, on ranks forked from a process that has imported everything."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.faults.train import train_with
from tests.forks import Forks

MODULES = (
    "deepspeed",
    "hg_scale.training.run",
    "hg_scale.training.engine",
    "tests.faults.train",
    "tests.faults.preload",
)


@dataclass(frozen=True)
class Outcome:
    """Exit code (negative: a signal) and terminal output of each rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        """The output of all ranks."""
        return "".join(self.outputs)


def run_with_fault(
    forks: Forks,
    fault: str,
    config: Path,
    folder: Path,
    *sets: str,
    size: int = 2,
    never_end: Collection[int] = (),
    seconds: float = 200,
) -> Outcome:
    """Train in `folder/run` until all ranks but those in `never_end`, which are killed, end."""
    options = [word for key in sets for word in ("--set", key)]
    arguments = ["--config", str(config), "--run", str(folder / "run"), *options]
    processes = forks.start(size, train_with, fault, arguments, folder / "terminal")
    try:
        end = time.monotonic() + seconds
        for rank, process in enumerate(processes):
            if rank not in never_end:
                process.join(max(0.0, end - time.monotonic()))
        hanging = [r for r, p in enumerate(processes) if p.is_alive() and r not in never_end]
        for rank in hanging:  # faulthandler then writes the stacks of its threads
            os.kill(processes[rank].pid, signal.SIGABRT)
            processes[rank].join(5)
    finally:
        for process in processes:
            process.kill()
            process.join()
    outputs = [Path(f"{folder / 'terminal'}-{rank}").read_text() for rank in range(size)]
    assert not hanging, f"ranks {hanging} of {size} do not end:\n{''.join(outputs)}"
    return Outcome([process.exitcode for process in processes], outputs)
