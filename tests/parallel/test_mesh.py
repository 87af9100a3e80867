"""Coordinates and groups of the mesh, and how the processes connect."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.errors import UserError
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import Mesh, compare_group, start_processes

sizes = st.integers(1, 4)


def test_tensor_ranks_are_adjacent_and_pipeline_is_outermost() -> None:
    mesh = Mesh(5, tensor=2, pipeline=2, data=2)
    assert (mesh.tensor_rank, mesh.data_rank, mesh.stage) == (1, 0, 1)
    assert mesh.group("tensor") == [4, 5]
    assert mesh.group("data") == [5, 7]
    assert mesh.group("pipeline") == [1, 5]
    assert mesh.group("model") == [0, 1, 4, 5]


@given(sizes, sizes, sizes)
def test_groups_partition_the_world(tensor: int, pipeline: int, data: int) -> None:
    mesh = Mesh(0, tensor, pipeline, data)
    lengths = {"tensor": tensor, "data": data, "pipeline": pipeline, "model": tensor * pipeline}
    for axis, length in lengths.items():
        groups = list(mesh.groups(axis))
        assert all(len(group) == length for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))


def test_a_different_group_of_a_library_is_refused() -> None:
    mesh = Mesh(0, tensor=2, pipeline=1, data=2)
    compare_group(mesh, "tensor", [0, 1], "Megatron")
    with pytest.raises(RuntimeError, match=r"Megatron's tensor group is \[0, 2\]"):
        compare_group(mesh, "tensor", [0, 2], "Megatron")


def test_missing_master_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    with pytest.raises(
        UserError, match="2 processes cannot connect: set MASTER_ADDR and MASTER_PORT"
    ):
        Launch(0, 2, 0).set_master_address()


@pytest.mark.parametrize(("visible", "index"), [(8, 5), (1, 0), (4, 1)])
def test_device_index_follows_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: int, index: int
) -> None:
    devices: list[torch.device] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "")
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert start_processes(Launch(13, 64, 5)) == torch.device("cuda", index)
    assert devices == [torch.device("cuda", index)] and os.environ["LOCAL_RANK"] == str(index)


def test_allocated_gpus_that_torch_does_not_see_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless DS_ACCELERATOR=cpu asks for the CPU."""
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_GPUS_ON_NODE": "8", "RANK": ""}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert start_processes(Launch()).type == "cpu"  # as set by tests/conftest.py
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(UserError, match="rank 0: Slurm allocated 8 GPUs on this node, but torch"):
        start_processes(Launch())
