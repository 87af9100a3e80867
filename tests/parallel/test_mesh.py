"""The mesh: coordinates and groups, against Megatron's and DeepSpeed's at run time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.errors import UserError
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import Mesh, compare_group

sizes = st.integers(1, 4)


def test_tensor_ranks_are_adjacent_and_pipeline_is_outermost() -> None:
    mesh = Mesh(5, tensor=2, pipeline=2, data=2)
    assert (mesh.tensor_rank, mesh.data_rank, mesh.stage) == (1, 0, 1)
    assert mesh.group("tensor") == [4, 5]
    assert mesh.group("data") == [5, 7]
    assert mesh.group("pipeline") == [1, 5]
    assert mesh.group("model") == [0, 1, 4, 5]


@given(sizes, sizes, sizes)
def test_groups_share_out_the_world(tensor: int, pipeline: int, data: int) -> None:
    mesh = Mesh(0, tensor, pipeline, data)
    lengths = {"tensor": tensor, "data": data, "pipeline": pipeline, "model": tensor * pipeline}
    for axis, length in lengths.items():
        groups = list(mesh.groups(axis))
        assert all(len(group) == length for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))


def test_another_librarys_group_that_differs_is_refused() -> None:
    mesh = Mesh(0, tensor=2, pipeline=1, data=2)
    compare_group(mesh, "tensor", [0, 1], "Megatron")
    with pytest.raises(RuntimeError, match=r"Megatron's tensor group is \[0, 2\]"):
        compare_group(mesh, "tensor", [0, 2], "Megatron")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            Launch(2, 4, 0),
        ),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, Launch(9, 16, 1)),
    ],
)
def test_the_launchers_variables(environment: dict[str, str], expected: Launch) -> None:
    assert Launch.from_environment(environment) == expected


def test_processes_that_cannot_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    with pytest.raises(UserError, match="2 processes .* set MASTER_ADDR and MASTER_PORT"):
        Launch(0, 2, 0).find_first()
