"""Which of how many processes this one is."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


@dataclass(frozen=True)
class Place:
    """A rank of a number of processes; `world` is MPI's communicator where MPI knows them."""

    rank: int = 0
    size: int = 1
    world: Any = None

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on {socket.gethostname()}"


def find_place() -> Place:
    """This process's place.

    From MPI where its world is more than one; else from the launcher's variables, since pip's MPI
    sees worlds of one under `srun`. MPI is loaded only where a launcher of its kind is at work.
    """
    environment = dict(os.environ)
    if any(name in environment for name in _MPI):
        with suppress(ImportError, RuntimeError):  # no mpi4py, or no MPI that it can load
            from mpi4py import MPI

            world = MPI.COMM_WORLD
            if world.size > 1:
                return Place(world.rank, world.size, world)
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
        environment.pop("SLURM_PROCID", None)  # in a batch script, which is one process
    for rank, size in _LAUNCHERS:
        if rank in environment and int(environment.get(size, 1)) > 1:
            return Place(int(environment[rank]), int(environment[size]))
    return Place()
