"""Who am I among the processes: read from the launcher's environment, before torch is imported."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hg_scale.errors import UserError

# Launchers and their variables for rank, world size and local rank; the first that is set wins.
# deepspeed and torchrun set RANK, Open MPI's mpirun and Slurm's srun their own.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Launch:
    """Rank among `world_size` processes, and rank on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """What the launcher said; without one, a world of one process."""
        for rank, world, local in _LAUNCHERS:
            if rank in environment and world in environment:
                return cls(
                    int(environment[rank]),
                    int(environment[world]),
                    int(environment.get(local, environment[rank])),
                )
        return cls()

    @property
    def processes_here(self) -> int:
        """Processes on this node, as far as the launcher says."""
        for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "LOCAL_SIZE"):
            if name in os.environ:
                return int(os.environ[name])
        return self.world_size

    def export(self) -> None:
        """Say it in the variables that torch and DeepSpeed read."""
        os.environ["RANK"] = str(self.rank)
        os.environ["WORLD_SIZE"] = str(self.world_size)
        os.environ["LOCAL_RANK"] = str(self.local_rank)

    def find_first(self) -> None:
        """Set MASTER_ADDR and MASTER_PORT, by which the processes find each other.

        Launchers set them, but mpirun does not: there the first rank tells the others over MPI.
        """
        if {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return
        remedy = "set MASTER_ADDR and MASTER_PORT to the first rank's host and a free port there"
        if "OMPI_COMM_WORLD_RANK" not in os.environ:
            raise UserError(f"the {self.world_size} processes cannot find each other: {remedy}")
        import mpi4py

        mpi4py.rc.initialize = False
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UserError(f"{remedy}; MPI cannot tell them: {error}") from None
        # Ended at once: a rank that fails later must not wait for the others in MPI's own end.
        MPI.Init()
        address = MPI.COMM_WORLD.bcast(self._own_address() if self.rank == 0 else None, root=0)
        MPI.Finalize()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address

    def _own_address(self) -> tuple[str, str]:
        """This host, and a port that is free on it."""
        host = "127.0.0.1" if self.processes_here == self.world_size else socket.gethostname()
        with socket.socket() as free:
            free.bind(("", 0))
            return host, str(free.getsockname()[1])
