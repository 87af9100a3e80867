"""Ranks under each launcher, from its environment alone."""

from __future__ import annotations

import os
import runpy
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.preparation import shuffled
from hg_scale.errors import UserError
from hg_scale.parallel import launch as launch_module
from hg_scale.parallel.launch import (
    Launch,
    LaunchError,
    affinity_problem,
    expand_counts,
    first_host,
    in_slurm_step,
)
from tests.shared import ROOT

BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "64", "SLURM_LOCALID": "0"}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "64",
    "SLURM_STEP_TASKS_PER_NODE": "8(x8)",
    "SLURM_STEP_NODELIST": "gpu[007-014]",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
}


ENVIRONMENTS = [
    ({}, Launch()),
    (TORCHRUN, Launch(3, 8, 1)),  # also of deepspeed
    (MPI, Launch(2, 4, 0)),
    (MPICH, Launch(1, 2, 0)),
    (MVAPICH, Launch(1, 2, 0)),
    (BATCH, Launch()),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch()),  # without a step
    (STEP, Launch(13, 64, 5)),
    # A step of one task in a job of 64, and a torchrun inside it.
    ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch(0, 1, 5)),
    ({**STEP, **TORCHRUN}, Launch(3, 8, 1)),
    # Steps with special numbers: interactive, batch, extern.
    *(({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA + i)}, Launch()) for i in range(3)),
    ({**STEP, "SLURM_STEP_ID": "batch"}, Launch()),
    # An mpirun inside a step is the nearer launcher.
    ({**STEP, **MPI}, Launch(2, 4, 0)),
    ({**STEP, **MPICH}, Launch(1, 2, 0)),
    ({**BATCH, **MPICH}, Launch(1, 2, 0)),
    # `srun --mpi=pmi2` and `--mpi=pmix` set such variables without a local rank.
    ({**STEP, "PMI_RANK": "13", "PMI_SIZE": "64", "PMIX_RANK": "13"}, Launch(13, 64, 5)),
]


VARIABLES = ("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.mark.parametrize(("environment", "expected"), ENVIRONMENTS)
def test_the_nearest_launcher_counts(environment: dict[str, str], expected: Launch) -> None:
    assert Launch.from_environment(environment) == expected


@pytest.mark.parametrize(("environment", "expected"), ENVIRONMENTS)
def test_preparations_have_the_ranks_of_training(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Launch
) -> None:
    """prepare_text.py passes the rank that train.py reads to its job."""
    launches: list[Launch] = []

    def record(job: shuffled.Job, progress: object) -> tuple[None, bool]:
        launches.append(job.launch)
        return None, False

    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # MPI is not needed
    monkeypatch.setattr(shuffled, "prepare", record)
    monkeypatch.setattr(sys, "argv", ["prepare_text.py", "--input", "in", "--output", "out"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = runpy.run_path(str(ROOT / "data_prep" / "prepare_text.py"))
    assert script["main"]() == 0
    assert launches == [Launch.from_environment()] == [expected]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x': expected a whole number from 0 on"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': expected a whole number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a whole number from 1 on"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='': expected a whole number from 1 on"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number from 1 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK='x': expected a whole"),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=2: expected less than OMPI_"),
    ],
)
def test_variables_that_make_no_sense(environment: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError) as raised:
        Launch.from_environment(environment)
    assert str(raised.value).startswith(told) and raised.value.exit_code == 2


def test_a_number_of_processes_here_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(
        LaunchError, match="LOCAL_WORLD_SIZE='0': expected a whole number from 1 on"
    ):
        _ = Launch(0, 2, 0).processes_here


@pytest.mark.parametrize(
    ("place", "told", "waits"),
    [(Launch(0, 16, 0), "a fault\n", []), (Launch(8, 16, 0), "", [10.0])],
)
def test_the_first_rank_speaks_first(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Launch,
    told: str,
    waits: list[float],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launch_module.time, "sleep", waited.append)
    assert place.refuse(UserError("a fault")) == 1
    assert (capsys.readouterr().err, waited) == (told, waits)


def test_a_plain_srun_leads_to_its_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    launch = Launch.from_environment()
    launch.find_first()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu007", "10007")
    assert launch.processes_here == 8
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    launch.find_first()
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-8]", "n1"),
        ("gpu[007-009,012],cpu1", "gpu007"),
        ("a-b[03]", "a-b03"),
        ("cpu1,gpu[1-2]", "cpu1"),
        ("rack[1-2]-ib,x", "rack1-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=6))
def test_counts_of_tasks_expand(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert expand_counts(text) == [count for count, times in runs for _ in range(times)]


def test_a_task_with_fewer_cores_than_promised_is_told() -> None:
    here = len(os.sched_getaffinity(0))
    assert affinity_problem({**STEP, "SLURM_CPUS_PER_TASK": str(here)}) is None
    assert affinity_problem({**BATCH, "SLURM_CPUS_PER_TASK": str(here + 1)}) is None
    told = affinity_problem({**STEP, "SLURM_CPUS_PER_TASK": str(here + 1)})
    assert told and f"{here} of the {here + 1} CPUs" in told and "SRUN_CPUS_PER_TASK" in told
    assert in_slurm_step(STEP) and not in_slurm_step(BATCH)
