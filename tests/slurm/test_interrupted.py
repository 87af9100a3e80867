"""Curves of runs that are signalled, preempted, timed out or lose a node, under a real Slurm."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hg_scale.exit_codes import REQUEUE
from tests.runs import curve, records, train
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import launcher, log_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]
Submit = Callable[..., int]

STEPS = 60  # enough to be interrupted in the middle; all are logged
INTERRUPTED = "{}: saved at step (\\d+), to be started again"


@pytest.fixture
def submit(
    cluster: Cluster, job_environment: dict[str, str], elsewhere: Path, tiny_3d: Path
) -> Iterator[Submit]:
    """`submit(options of sbatch, key=value, ...)` starts a run with tensor 2 and pipeline 2."""
    jobs = []

    def submit(options: tuple[str, ...], *sets: str, steps: int = STEPS) -> int:
        keys = [f"training.steps={steps}", "checkpoint.every=0", *sets]
        words = [word for key in keys for word in ("--set", key)]
        jobs.append(
            cluster.submit(
                "--ntasks-per-node=1", *options, launcher("train_64gpu.sh"), *words,
                folder=elsewhere,
                environment={**job_environment, "CONFIG": str(tiny_3d), "RUN": "run"},
            )
        )  # fmt: skip
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.command("scancel", str(job))
        cluster.wait(job, 60)


@pytest.fixture
def alone(tiny_3d: Path, tmp_path: Path) -> Callable[..., list[tuple[int, float, float]]]:
    """The curve of an uninterrupted run of one process."""

    def alone(*sets: str, steps: int = STEPS, until: int | None = None) -> list:
        keys = (f"training.steps={steps}", "parallel.tensor=1", "parallel.pipeline=1",
                "checkpoint.every=0", *sets)  # fmt: skip
        words = [word for key in keys for word in ("--set", key)]
        run = tmp_path / "alone"
        done = train(
            "--config", str(tiny_3d), "--run", str(run), *words, "--stop-at", str(until or steps)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return curve(run)

    return alone


def wait_for_step(cluster: Cluster, job: int, folder: Path, step: int) -> None:
    """Wait until a running job has logged a step."""
    end = time.monotonic() + 200
    while True:
        run = folder / "run"
        logged = [r["step"] for r in records(run)] if (run / "metrics.jsonl").exists() else []
        if logged and logged[-1] >= step and cluster.state(job)["JobState"] == "RUNNING":
            return
        assert time.monotonic() < end, log_of(folder)
        time.sleep(0.1)


def codes(folder: Path) -> list[int]:
    """Return the exit codes of the run's jobs."""
    lines = map(json.loads, (folder / "run" / "jobs.jsonl").read_text().splitlines())
    return [line["code"] for line in lines if line["event"] == "end"]


def saved_at(folder: Path, reason: str) -> int:
    """Return the step at which a run was interrupted; check that it resumed from there."""
    log = log_of(folder)
    (step,) = re.findall(INTERRUPTED.format(reason), log)
    assert f"resumed at step {step} from" in log
    assert "Traceback" not in log
    return int(step)


def test_warning_signal_saves_and_requeues(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list], tiny_3d: Path
) -> None:
    """The job runs on with the configuration of its first start, whose base is edited meanwhile."""
    base = tiny_3d.with_name("base.json")
    text = tiny_3d.read_text()
    base.write_text(text)
    tiny_3d.write_text('{"extends": "base.json"}')
    job = submit(("--nodes=8",))
    wait_for_step(cluster, job, elsewhere, 5)
    base.write_text(json.dumps({**json.loads(text), "optimizer": {"learning_rate": 0.025}}))
    cluster.command("scancel", "--signal=USR1", str(job))  # sent to the ranks, as by --signal
    state = cluster.wait(job, 240)
    log = log_of(elsewhere)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert codes(elsewhere) == [REQUEUE, 0]
    assert 5 <= saved_at(elsewhere, "signal USR1") < STEPS
    assert "exit code 75: saved, to be started again; requeued" in log
    assert log.count("which continues without: optimizer.learning_rate unset -> 0.025; to use") == 1
    base.write_text(text)
    np.testing.assert_allclose(curve(elsewhere / "run"), alone(), rtol=1e-4)


def test_preemption_saves_and_requeues(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list]
) -> None:
    """By a job of higher priority on all nodes; 30 s of grace are enough to save."""
    job = submit(("--nodes=4", "--signal=URG@1"))
    wait_for_step(cluster, job, elsewhere, 5)
    urgent = ("--partition=urgent", "--nodes=9", "--exclusive", "--output=urgent.txt")
    other = cluster.submit(*urgent, "--wrap=sleep 3", folder=elsewhere)
    cluster.wait(other, 120)
    state = cluster.wait(job, 240)
    log = log_of(elsewhere)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert 5 <= saved_at(elsewhere, "signal TERM") < STEPS
    np.testing.assert_allclose(curve(elsewhere / "run"), alone(), rtol=1e-4)


def test_time_limit_saves_and_requeues(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list]
) -> None:
    """Without a signal: the run ends when another step and a save may not fit in the time left."""
    sets, steps = ("optimizer.learning_rate=1e-6", "training.stop_margin=90"), 10**6
    job = submit(("--nodes=4", "--time=3", "--signal=URG@1"), *sets, steps=steps)
    wait_for_step(cluster, job, elsewhere, 1)
    end = time.monotonic() + 200
    while "to be started again; requeued" not in log_of(elsewhere):
        assert time.monotonic() < end, log_of(elsewhere)
        time.sleep(0.2)
    (step,) = re.findall(INTERRUPTED.format("the time limit is near"), log_of(elsewhere))
    wait_for_step(cluster, job, elsewhere, int(step) + 3)
    assert cluster.state(job)["Restarts"] == "1"
    cluster.command("scancel", str(job))
    cluster.wait(job, 60)
    assert saved_at(elsewhere, "the time limit is near") == int(step)
    assert codes(elsewhere)[0] == REQUEUE
    until = int(step) + 3
    expected = alone(*sets, steps=steps, until=until)
    np.testing.assert_allclose(curve(elsewhere / "run")[:until], expected, rtol=1e-4)


def test_a_node_lost_in_a_step_restarts_the_job(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list]
) -> None:
    """On the ninth node in its place."""
    job = submit(("--nodes=8",), "checkpoint.every=4")
    wait_for_step(cluster, job, elsewhere, 6)
    nodes = node_names(cluster, job)
    (ninth,) = {f"n{number}" for number in range(1, 10)} - set(nodes)
    cluster.lose(nodes[-1])
    try:
        state = cluster.wait(job, 300)
        log = log_of(elsewhere)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
        assert set(node_names(cluster, job)) == {*nodes[:-1], ninth}
        assert re.search(r"rank \d lost its connection to the others at step \d+: ", log)
        assert "Traceback" not in log
        np.testing.assert_allclose(curve(elsewhere / "run"), alone(), rtol=1e-4)
    finally:
        cluster.start_node(nodes[-1])


def test_elastic_job_resumes_on_fewer_nodes_in_another_layout(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list]
) -> None:
    """8 ranks on 4 nodes, of which one is lost: 6 ranks, with more pipeline stages.

    Two ranks per node: with one, Slurm would allocate only 2 of `--nodes=2-4`, for 2 tasks.
    """
    spare = "n[5-9]"
    cluster.command("scontrol", "update", f"NodeName={spare}", "State=DRAIN", "Reason=spare")
    lost = None
    try:
        assert cluster.wait_for_idle(4)
        keys = ("parallel.elastic=true", "checkpoint.every=4", "training.global_batch_size=4")
        job = submit(("--nodes=2-4", "--ntasks-per-node=2", "--cpus-per-task=4"), *keys)
        wait_for_step(cluster, job, elsewhere, 6)
        lost = node_names(cluster, job)[-1]
        cluster.lose(lost)
        # Slurm 22.05 keeps the number of tasks of the first start, and would wait for the node.
        cluster.wait_for(job, {"PENDING"}, 90)
        cluster.command("scontrol", "update", f"JobId={job}", "NumTasks=4")
        state = cluster.wait(job, 300)
        log = log_of(elsewhere)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
        assert "8 processes: tensor 2 x pipeline 2 x data 2" in log
        assert "parallel.elastic: continuing with 6 of 6 processes: --set parallel.tensor=2" in log
        assert layout_of(elsewhere) == (2, 3, 1)
        np.testing.assert_allclose(curve(elsewhere / "run"), alone(), rtol=1e-4)
    finally:
        cluster.command("scontrol", "update", f"NodeName={spare}", "State=RESUME")
        if lost:
            cluster.start_node(lost)


def test_elastic_job_leaves_tasks_without_a_layout_idle(
    cluster: Cluster, submit: Submit, elsewhere: Path, alone: Callable[..., list]
) -> None:
    keys = ("parallel.elastic=true", "training.global_batch_size=4")
    job = submit(("--nodes=5",), *keys, steps=6)
    state = cluster.wait(job, 240)
    log = log_of(elsewhere)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), log
    assert "parallel.elastic: continuing with 4 of 5 processes: --set parallel.tensor=2" in log
    assert layout_of(elsewhere, 6) == (2, 2, 1)
    np.testing.assert_allclose(curve(elsewhere / "run"), alone(steps=6), rtol=1e-4)


def layout_of(folder: Path, step: int = STEPS) -> tuple[int, int, int]:
    """Return the tensor, pipeline and data sizes in a checkpoint."""
    manifest = folder / "run" / "checkpoints" / f"step-{step:08}" / "manifest.json"
    layout = json.loads(manifest.read_text())["layout"]
    return layout["tensor"], layout["pipeline"], layout["data"]


def node_names(cluster: Cluster, job: int) -> list[str]:
    """Return the names of a job's nodes."""
    node_list = cluster.state(job)["NodeList"]
    return cluster.command("scontrol", "show", "hostnames", node_list).split()
