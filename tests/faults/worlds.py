"""Runs with a planted fault, on ranks forked off one process that has imported all."""

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
    """How each rank ended (negative: by that signal), and what its terminal saw."""

    codes: list[int]
    told: list[str]

    @property
    def all_told(self) -> str:
        return "".join(self.told)


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
    """Train in `folder/run` until all ranks ended; those that `never_end` are killed then."""
    words = [word for key in sets for word in ("--set", key)]
    arguments = ["--config", str(config), "--run", str(folder / "run"), *words]
    processes = forks.start(size, train_with, fault, arguments, folder / "terminal")
    try:
        end = time.monotonic() + seconds
        for rank, process in enumerate(processes):
            if rank not in never_end:
                process.join(max(0.0, end - time.monotonic()))
        hanging = [r for r, p in enumerate(processes) if p.is_alive() and r not in never_end]
        for rank in hanging:  # faulthandler then shows where its threads are
            os.kill(processes[rank].pid, signal.SIGABRT)
            processes[rank].join(5)
    finally:
        for process in processes:
            process.kill()
            process.join()
    told = [Path(f"{folder / 'terminal'}-{rank}").read_text() for rank in range(size)]
    assert not hanging, f"ranks {hanging} of {size} do not end:\n{''.join(told)}"
    return Outcome([process.exitcode for process in processes], told)
