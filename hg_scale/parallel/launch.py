"""Rank, world size and rendezvous of this process, from the launcher's environment; no torch."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR

# Launchers and their variables for rank, world size and local rank; the first that is set wins, as
# one launcher may have started the other. RANK is of deepspeed and torchrun, OMPI of Open MPI's
# mpirun, MV2 of MVAPICH's mpirun_rsh, PMI of the mpirun of MPICH and Intel MPI.
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    _PMI,
    _SLURM,
)
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS", "LOCAL_SIZE",
)  # fmt: skip
# Slurm numbers a job's steps from 0; the batch script, an interactive shell and the like have
# numbers from here on, and are one process whatever SLURM_NTASKS says.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_FIRST_PORT, _PORTS = 10_000, 19_997  # below the ephemeral ports of outgoing connections
_REPORT_SECONDS = 10.0  # in which rank 0 has reported an error that every rank finds


class LaunchError(UserError):
    """The launcher's variables are not consistent numbers."""

    exit_code = CONFIG_ERROR


@dataclass(frozen=True)
class Launch:
    """Rank among `world_size` processes, and rank on this node (`local_rank`)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the launcher's variables; without a launcher, a world of one process.

        Raises LaunchError.
        """
        for names in _LAUNCHERS:
            rank, world, local = names
            if names == _SLURM and not in_slurm_step(environment):
                continue
            if names == _PMI and in_slurm_step(environment) and local not in environment:
                continue  # of `srun --mpi=pmi2`, which does not set the local rank
            if rank in environment and world in environment:
                size = _number(environment, world, 1)
                found = _number(environment, rank)
                if found >= size:
                    raise LaunchError(
                        f"{rank}={found}: expected less than {world}={size}; ranks count from 0"
                    )
                return cls(
                    found, size, _number(environment, local) if local in environment else found
                )
        return cls()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    @property
    def local_world_size(self) -> int:
        """Processes on this node; `world_size` if the launcher does not set it."""
        for name in _LOCAL_SIZES:
            if name in os.environ:
                return _number(os.environ, name, 1)
        if in_slurm_step(os.environ) and "SLURM_STEP_TASKS_PER_NODE" in os.environ:
            by_node = expand_counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])
            return by_node[int(os.environ["SLURM_NODEID"])]
        return self.world_size

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks see the same files, and so find the same errors in them."""
        return self.local_world_size == self.world_size

    def report(self, error: UserError) -> int:
        """Print an error that every rank finds before they connect; return its exit code.

        Only rank 0 prints. The others wait, since mpirun, and srun at some sites, kill all ranks
        as soon as one exits, which could be before rank 0 has printed.
        """
        if self.rank == 0:
            print(error, file=sys.stderr, flush=True)
        else:
            time.sleep(_REPORT_SECONDS)
        return error.exit_code

    def export(self) -> None:
        """Set the environment variables that torch and DeepSpeed read."""
        os.environ["RANK"] = str(self.rank)
        os.environ["WORLD_SIZE"] = str(self.world_size)
        os.environ["LOCAL_RANK"] = str(self.local_rank)

    def set_master_address(self) -> None:
        """Set MASTER_ADDR and MASTER_PORT, through which the processes connect.

        Most launchers and `slurm/*.sh` set them already. A plain `srun` does not, but names the
        step's first node. Nor does mpirun: there rank 0 broadcasts them over MPI. Raises UserError.
        """
        if {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return
        if in_slurm_step(os.environ) and "OMPI_COMM_WORLD_RANK" not in os.environ:
            os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
            os.environ.setdefault("MASTER_PORT", str(port_of_step(os.environ)))
            return
        remedy = "set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there"
        if "OMPI_COMM_WORLD_RANK" not in os.environ:
            raise UserError(f"the {self.world_size} processes cannot connect: {remedy}")
        import mpi4py

        mpi4py.rc.initialize = False
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UserError(f"{remedy}; MPI is not available for it: {error}") from None
        # Finalized at once: a rank that fails later must not wait for the others in MPI_Finalize.
        MPI.Init()
        address = MPI.COMM_WORLD.bcast(self._own_address() if self.rank == 0 else None, root=0)
        MPI.Finalize()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address

    def _own_address(self) -> tuple[str, str]:
        """This host and a free port of it."""
        host = "127.0.0.1" if self.on_one_node else socket.gethostname()
        with socket.socket() as free:
            free.bind(("", 0))
            return host, str(free.getsockname()[1])


def _number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    """Read a variable that launchers set to an integer. Raises LaunchError."""
    text = environment[name]
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(
            f"{name}={text!r}: expected an integer of at least {least}, as launchers set it; "
            "correct or unset it"
        )
    return int(text)


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one task of a step.

    A batch script also has SLURM_PROCID and SLURM_NTASKS, but is a single process.
    """
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def port_of_step(environment: Mapping[str, str]) -> int:
    """Return the port at which the ranks of a Slurm job step meet.

    Steps of one job, its restarts and other jobs may share a node. The ports of eight steps and
    eight restarts of 312 consecutive jobs differ. `slurm/common.sh` has the same formula.
    """
    job = int(environment["SLURM_JOB_ID"])
    step = int(environment.get("SLURM_STEP_ID", 0))
    restarts = int(environment.get("SLURM_RESTART_COUNT", 0))
    return _FIRST_PORT + (64 * job + 8 * step + restarts) % _PORTS


def expand_counts(text: str) -> list[int]:
    """Expand Slurm's tasks per node: `8(x2),4` is [8, 8, 4]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's node list: `gpu007` of `gpu[007-009,012],cpu1`."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    numbers, _, suffix = rest.partition("]")
    return name + re.split("[-,]", numbers, maxsplit=1)[0] + suffix.partition(",")[0]


def affinity_problem(environment: Mapping[str, str] = os.environ) -> str | None:
    """Describe a Slurm task that may use fewer CPUs than the job requested; None if it may not.

    `srun` of 22.05 and later ignores the batch script's --cpus-per-task, and may pin all threads
    of a task to one core.
    """
    requested = int(environment.get("SLURM_CPUS_PER_TASK") or 0)
    allowed = len(os.sched_getaffinity(0))
    if not in_slurm_step(environment) or allowed >= requested:
        return None
    return (
        f"this task may use {allowed} of the {requested} CPUs that the job requested per task; "
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun, as slurm/common.sh does, or "
        "request fewer with --cpus-per-task"
    )
