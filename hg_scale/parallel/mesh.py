"""The mesh of processes: tensor ranks adjacent, then data, pipeline outermost.

DeepSpeed's `PipeModelDataParallelTopology` and Megatron's default order (tp-cp-ep-dp-pp) both
agree with it; at start-up the groups of both are compared with those computed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.config.training_sections import ParallelConfig
from hg_scale.errors import UserError
from hg_scale.model.layers import PlainLayers
from hg_scale.parallel.launch import Launch, in_slurm_step
from hg_scale.parallel.timeouts import LONG


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes and this rank's place on them."""

    rank: int
    tensor: int
    pipeline: int
    data: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor * self.data)

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline - 1

    def groups(self, axis: str) -> Iterator[list[int]]:
        """All groups of ranks along an axis: tensor, data, pipeline, or model (both others)."""
        moves = {"tensor": "t", "data": "d", "pipeline": "p", "model": "tp"}[axis]
        coordinates: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            other = Mesh(rank, self.tensor, self.pipeline, self.data)
            place = {"t": other.tensor_rank, "d": other.data_rank, "p": other.stage}
            key = tuple(value for name, value in place.items() if name not in moves)
            coordinates.setdefault(key, []).append(rank)
        yield from coordinates.values()

    def group(self, axis: str) -> list[int]:
        """This rank's group along an axis."""
        return next(group for group in self.groups(axis) if self.rank in group)


def start_processes(launch: Launch) -> torch.device:
    """Join the world (gloo on a CPU, NCCL on GPUs) and return this rank's device.

    DeepSpeed adopts the process group made here; it must be told of the CPU before its import.
    DS_ACCELERATOR=cpu asks for the CPU where there are GPUs. Raises UserError where Slurm gave this
    node GPUs and torch sees none: days of training on a CPU are never what was meant.
    """
    launch.export()
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not gpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        refuse_missing_gpus(launch)
    if gpu:
        # Some sites show each task one GPU only.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the device
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # or each process would take all cores
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // launch.processes_here))
    if not dist.is_initialized():
        options: dict[str, Any] = {"timeout": LONG}
        if launch.world_size > 1:
            launch.find_first()
        elif "MASTER_ADDR" not in os.environ:
            options["store"] = dist.HashStore()
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            rank=launch.rank,
            world_size=launch.world_size,
            **options,
        )
    return device


def refuse_missing_gpus(launch: Launch) -> None:
    """Raise UserError where Slurm gave this node GPUs, though torch sees none."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if in_slurm_step(os.environ) and given != "0":
        raise UserError(
            f"rank {launch.rank}: Slurm gave this node {given} GPUs and torch sees none (torch "
            f"{torch.__version__}); run `hg-scale doctor` there, or set DS_ACCELERATOR=cpu"
        )


def make_mesh(parallel: ParallelConfig) -> tuple[Mesh, PlainLayers]:
    """This rank's place, and the layers factory for it.

    Megatron is imported, and its groups made and compared, where there is tensor parallelism.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    data = world // (parallel.tensor * parallel.pipeline)
    mesh = Mesh(rank, parallel.tensor, parallel.pipeline, data)
    if parallel.tensor == 1:
        return mesh, PlainLayers()
    from hg_scale.parallel import megatron

    megatron.initialize_groups(parallel.tensor, parallel.pipeline)
    for axis, ranks in megatron.group_ranks().items():
        compare_group(mesh, axis, ranks, "Megatron")
    return mesh, megatron.MegatronLayers()


def compare_group(mesh: Mesh, axis: str, ranks: list[int], whose: str) -> None:
    """Raise where another library's group along an axis is not the mesh's."""
    if sorted(ranks) != mesh.group(axis):
        raise RuntimeError(
            f"rank {mesh.rank}: {whose}'s {axis} group is {ranks}, expected {mesh.group(axis)}"
        )


def forget_groups() -> None:
    """Forget Megatron's groups, where they were made, before the world is taken down."""
    if "hg_scale.parallel.megatron" in sys.modules:
        sys.modules["hg_scale.parallel.megatron"].destroy_groups()
