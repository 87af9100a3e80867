"""Who am I among the processes: read from the launcher's environment, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

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
