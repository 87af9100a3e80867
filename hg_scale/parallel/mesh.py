"""The mesh of processes: tensor ranks adjacent, then data, pipeline outermost.

DeepSpeed's `PipeModelDataParallelTopology` and Megatron's default order (tp-cp-ep-dp-pp) agree with
it; at start-up the groups of both are compared with those computed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hg_scale.config.training_sections import ParallelConfig
from hg_scale.errors import UserError
from hg_scale.model.layers import PlainLayers
from hg_scale.parallel.launch import Launch, in_slurm_step
from hg_scale.parallel.rendezvous import meet
from hg_scale.parallel.timeouts import LONG


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes and this rank's coordinates on them."""

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
        """Yield the groups of ranks along an axis: tensor, data, pipeline, or model.

        A model group holds the tensor and pipeline ranks of one replica.
        """
        varying = {"tensor": "t", "data": "d", "pipeline": "p", "model": "tp"}[axis]
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            other = Mesh(rank, self.tensor, self.pipeline, self.data)
            position = {"t": other.tensor_rank, "d": other.data_rank, "p": other.stage}
            fixed = tuple(value for name, value in position.items() if name not in varying)
            members.setdefault(fixed, []).append(rank)
        yield from members.values()

    def group(self, axis: str) -> list[int]:
        """Return this rank's group along an axis."""
        return next(group for group in self.groups(axis) if self.rank in group)


def start_processes(launch: Launch, report: Callable[[str], None] = print) -> torch.device:
    """Initialise the process group (gloo on a CPU, NCCL on GPUs); return this rank's device.

    report: told for which ranks this one waits.

    DeepSpeed adopts this process group; on a CPU, DS_ACCELERATOR must be set before its import. The
    user sets DS_ACCELERATOR=cpu to train on the CPU of a machine with GPUs. Raises UserError if
    Slurm allocated GPUs that torch does not see, since nobody wants days of training on a CPU, and
    the errors of `meet`.
    """
    launch.export()
    cpu_requested = os.environ.get("DS_ACCELERATOR") == "cpu"
    use_gpu = torch.cuda.is_available() and not cpu_requested
    if not use_gpu and not cpu_requested:
        refuse_missing_gpus(launch)
    if use_gpu:
        # Some sites make only one GPU visible to each task.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed uses it as the device index
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # each process would start a thread per core
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // launch.local_world_size))
    if not dist.is_initialized():
        _init_process_group(launch, "nccl" if use_gpu else "gloo", report)
    return device


def _init_process_group(launch: Launch, backend: str, report: Callable[[str], None]) -> None:
    """Connect the ranks; a world of one process needs no address."""
    store: dist.Store = dist.HashStore()
    if launch.world_size > 1:
        launch.set_master_address()
        store = meet(launch, report)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=LONG
    )


def refuse_missing_gpus(launch: Launch) -> None:
    """Raise UserError if Slurm allocated GPUs on this node and torch sees none."""
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if in_slurm_step(os.environ) and allocated != "0":
        raise UserError(
            f"rank {launch.rank}: Slurm allocated {allocated} GPUs on this node, but torch "
            f"{torch.__version__} sees none; run `hg-scale doctor` there, or set DS_ACCELERATOR=cpu"
        )


def make_mesh(parallel: ParallelConfig) -> tuple[Mesh, PlainLayers]:
    """Return this rank's mesh and its layers factory.

    Only with tensor parallelism is Megatron imported and its groups created and compared.
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


def compare_group(mesh: Mesh, axis: str, ranks: list[int], library: str) -> None:
    """Raise RuntimeError if a library's group along an axis differs from the mesh's."""
    if sorted(ranks) != mesh.group(axis):
        raise RuntimeError(
            f"rank {mesh.rank}: {library}'s {axis} group is {ranks}, expected {mesh.group(axis)}"
        )


def forget_groups() -> None:
    """Drop Megatron's groups, if it has any, before the process group is destroyed."""
    if "hg_scale.parallel.megatron" in sys.modules:
        sys.modules["hg_scale.parallel.megatron"].destroy_groups()
