"""Rank, world size and rendezvous under each launcher, from its environment alone."""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
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
    port_of_step,
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
def test_rank_and_world_size_are_those_of_the_innermost_launcher(
    environment: dict[str, str], expected: Launch
) -> None:
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
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x': expected an integer of at least 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': expected an integer of at least 0"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected an integer of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='': expected an integer of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected an integer of at least 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
            "LOCAL_RANK='x': expected an integer",
        ),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=2: expected less than OMPI_"),
    ],
)
def test_invalid_variables_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as raised:
        Launch.from_environment(environment)
    assert str(raised.value).startswith(message) and raised.value.exit_code == 2


def test_invalid_local_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(
        LaunchError, match="LOCAL_WORLD_SIZE='0': expected an integer of at least 1"
    ):
        _ = Launch(0, 2, 0).local_world_size


@pytest.mark.parametrize(
    ("launch", "output", "waits"),
    [(Launch(0, 16, 0), "an error\n", []), (Launch(8, 16, 0), "", [10.0])],
)
def test_rank_0_reports_while_the_others_wait(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launch: Launch,
    output: str,
    waits: list[float],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launch_module.time, "sleep", waited.append)
    assert launch.report(UserError("an error")) == 1
    assert (capsys.readouterr().err, waited) == (output, waits)


def test_master_address_under_plain_srun_is_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what is set below
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    launch = Launch.from_environment()
    launch.set_master_address()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu007", "10448")
    assert launch.local_world_size == 8
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("MASTER_PORT")
    launch.set_master_address()  # the one that is set is kept
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "10448")


def step_port(job: int, step: int, restarts: int) -> int:
    """Return the port of a step of a job."""
    values = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restarts}
    return port_of_step({name: str(value) for name, value in values.items()})


@given(st.integers(1, 2**40))
def test_neighbouring_jobs_steps_and_restarts_have_different_ports(first: int) -> None:
    near = itertools.product((0, 1, 2, 311), range(8), range(8))  # also elements of an array
    ports = [step_port(first + job, step, restarts) for job, step, restarts in near]
    assert len(set(ports)) == len(ports) and all(10_000 <= port < 29_997 for port in ports)


def test_the_job_script_has_the_port_of_step_0() -> None:
    script = (ROOT / "slurm" / "common.sh").read_text()
    [line] = [line for line in script.splitlines() if line.startswith("export MASTER_PORT=")]
    for job, restarts in ((7, None), (4242, 0), (4242, 3), (2**31, 1)):
        environment = {"SLURM_JOB_ID": str(job)}
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        command = ["bash", "-uc", f'{line}; echo "$MASTER_PORT"']
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert int(done.stdout) == port_of_step(environment), done.stderr


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
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=6))
def test_task_counts_expand(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert expand_counts(text) == [count for count, times in runs for _ in range(times)]


def test_a_task_with_fewer_cores_than_requested_is_described() -> None:
    cores = len(os.sched_getaffinity(0))
    assert affinity_problem({**STEP, "SLURM_CPUS_PER_TASK": str(cores)}) is None
    assert affinity_problem({**BATCH, "SLURM_CPUS_PER_TASK": str(cores + 1)}) is None
    problem = affinity_problem({**STEP, "SLURM_CPUS_PER_TASK": str(cores + 1)})
    assert problem and f"{cores} of the {cores + 1} CPUs" in problem
    assert "SRUN_CPUS_PER_TASK" in problem
    assert in_slurm_step(STEP) and not in_slurm_step(BATCH)
