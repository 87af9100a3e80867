"""Which exit codes and events requeue a training job, under a real Slurm.

The ranks are a script with given exit codes, which needs no memory. `test_training.py` tests
training itself.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hg_scale.exit_codes import CONFIG_ERROR, FAILED, GAVE_UP, LOST, REQUEUE
from hg_scale.parallel.launch import Launch, port_of_step
from hg_scale.training.monitoring.status import read_status
from tests.shared import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import launcher, log_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
Environment = dict[str, str]
Start = Callable[..., int]

# Passes the check; then ends as the file $ENDS lists, one word per start.
RANK = """#!/bin/bash
[[ $1 != -m ]] || exit 0  # the event that the batch script sends at its end
for word in "$@"; do
  [[ $word == --check ]] || continue
  [[ $(<"$ENDS") != refused ]] || { echo "refused: taken"; exit 1; }
  exit 0
done
echo "rank $SLURM_PROCID start ${SLURM_RESTART_COUNT:-0} runs $1 $(cksum <"$1")"
env >"$ENDS.env-$SLURM_PROCID"
[[ $SLURM_PROCID != 0 ]] || echo "# edited" >>"$REPOSITORY/hg_scale/train.py"
read -ra ends <"$ENDS"
end=${ends[${SLURM_RESTART_COUNT:-0}]:-0}
case $end in
  killed) [[ $SLURM_PROCID != 1 ]] || kill -9 $$; sleep 1; exit 1 ;;
  waits) exec sleep 600 ;;
  *) exit "$end" ;;
esac
"""


@pytest.fixture
def start(cluster: Cluster, job_environment: Environment, elsewhere: Path, tmp_path: Path) -> Start:
    """`start(end, ...)` submits a job of two tasks with one given end for each of its starts.

    It runs from a copy of the repository, in which rank 0 edits `train.py`.
    """
    for name in ("hg_scale", "configs", "data_prep", "slurm"):
        shutil.copytree(
            ROOT / name,
            tmp_path / "repository" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    rank = tmp_path / "rank"
    rank.write_text(RANK)
    rank.chmod(0o755)

    def start(
        *ends: str | int,
        name: str = "train_64gpu.sh",
        options: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1"),
        **more: str,
    ) -> int:
        (tmp_path / "ends").write_text(" ".join(map(str, ends)) + "\n")
        environment = {
            **job_environment, "HG_PYTHON": str(rank), "ENDS": str(tmp_path / "ends"),
            "RUN": "run", "REPOSITORY": str(tmp_path / "repository"), **more,
        }  # fmt: skip
        script = str(tmp_path / "repository" / "slurm" / name)
        return cluster.submit(*options, script, folder=elsewhere, environment=environment)

    return start


def journal(folder: Path) -> list[tuple[int, str, int | None]]:
    """(start, event, exit code) of the run's jobs."""
    lines = map(json.loads, (folder / "run" / "jobs.jsonl").read_text().splitlines())
    return [(line["start"], line["event"], line.get("code")) for line in lines]


def wait_for_log(folder: Path, text: str, timeout: float = 60) -> None:
    """Wait until a job has logged `text`."""
    end = time.monotonic() + timeout
    while text not in log_of(folder):
        assert time.monotonic() < end, log_of(folder)
        time.sleep(0.1)


@pytest.mark.parametrize("code", [FAILED, CONFIG_ERROR, GAVE_UP])
def test_errors_that_a_restart_cannot_fix_are_not_requeued(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
    code: int,
) -> None:
    state = cluster.wait(start(code))
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), log_of(elsewhere)
    assert state["ExitCode"] == f"{code}:0"
    assert journal(elsewhere) == [(1, "start", None), (1, "end", code)]
    assert not (elsewhere / "run" / "finished").exists()


def test_a_refused_job_leaves_the_files_of_the_living_run(
    cluster: Cluster, start: Start, elsewhere: Path
) -> None:
    run = elsewhere / "run"
    (run / "ranks").mkdir(parents=True)
    kept = {"restarts": "step-00000004 2", "ranks/rank-00001.end": "{}", "jobs.jsonl": "{}\n"}
    for name, text in kept.items():
        (run / name).write_text(text)
    state = cluster.wait(start("refused"))
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "1:0"), log_of(elsewhere)
    assert "refused: taken" in log_of(elsewhere)
    assert {name: (run / name).read_text() for name in kept} == kept


def test_saved_and_lost_jobs_restart_with_the_code_of_their_first_start(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
    tmp_path: Path,
) -> None:
    job = start(REQUEUE, LOST, "killed")
    state = cluster.wait(job, 300)
    log = log_of(elsewhere)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "3"), log
    codes = [code for _, event, code in journal(elsewhere) if event == "end"]
    assert codes == [REQUEUE, LOST, 128 + signal.SIGKILL, 0], log
    edited = (tmp_path / "repository" / "hg_scale" / "train.py").read_text()
    assert edited.count("# edited") == 4
    scripts = {line.split(" runs ")[1] for line in log.splitlines() if line.startswith("rank ")}
    assert len(scripts) == 1 and f"/run/code/{job}/hg_scale/train.py" in scripts.pop()
    assert (elsewhere / "run" / "finished").exists()


def test_environment_of_a_rank(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
    tmp_path: Path,
    job_environment: Environment,
) -> None:
    """Rendezvous, node-local caches, the CPUs of the batch script, no Slurm on the PATH."""
    job = start(0)
    assert cluster.wait(job)["JobState"] == "COMPLETED", log_of(elsewhere)
    port = str(port_of_step({"SLURM_JOB_ID": str(job)}))
    for rank in range(2):
        lines = (tmp_path / f"ends.env-{rank}").read_text().splitlines()
        found = dict(line.split("=", 1) for line in lines if "=" in line)
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", port)
        assert (found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"]) == (str(rank), "2")
        assert found["SLURM_CPUS_PER_TASK"] == found["SRUN_CPUS_PER_TASK"] == "8"
        assert found["SLURM_GPUS_ON_NODE"] == "8"
        for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            assert Path(found[name]).is_relative_to(job_environment["HG_SCRATCH"])
        assert found["PYTHONPATH"].split(":")[0] == f"{elsewhere}/run/code/{job}"
        assert not (Path(found["PATH"]) / "scontrol").exists()
        assert int(found["HG_END_TIME"]) > time.time()


def test_ranks_of_64_tasks_are_adjacent_within_a_node(
    cluster: Cluster, start: Start, elsewhere: Path, tmp_path: Path
) -> None:
    """With the unchanged script but fewer cores, which a fake node lacks: 8 tasks per node."""
    job = start(0, options=("--cpus-per-task=1",))
    assert cluster.wait(job)["JobState"] == "COMPLETED", log_of(elsewhere)
    log = log_of(elsewhere)
    assert f"job {job}, start 1: 64 tasks on n[1-" in log and "warning" not in log
    for rank in range(64):
        lines = (tmp_path / f"ends.env-{rank}").read_text().splitlines()
        found = dict(line.split("=", 1) for line in lines if "=" in line)
        assert Launch.from_environment(found) == Launch(rank, 64, rank % 8)
        assert found["SLURM_NODEID"] == str(rank // 8)
        assert found["SLURM_STEP_TASKS_PER_NODE"] == "8(x8)"


def test_array_elements_are_requeued_individually(
    cluster: Cluster, start: Start, elsewhere: Path
) -> None:
    """The job id of the last element is also that of the whole array."""
    (elsewhere / "points.txt").write_text("training.seed=1\ntraining.seed=2\n")
    array = ("--nodes=1", "--ntasks-per-node=1", "--array=1-2")
    job = start(REQUEUE, name="sweep_array.sh", options=array, POINTS="points.txt")
    for number in (1, 2):
        state = cluster.wait(f"{job}_{number}", 120)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log_of(elsewhere)
        lines = (elsewhere / f"runs/points/training.seed={number}/jobs.jsonl").read_text()
        codes = [json.loads(line).get("code") for line in lines.splitlines()]
        assert codes == [None, REQUEUE, None, 0]
        assert json.loads(lines.splitlines()[0])["job"] == f"{job}_{number}"
        log = json.loads(lines.splitlines()[0])["log"]
        assert log == str(elsewhere / f"hg-sweep-{job}-{number}.log") and Path(log).is_file()
    assert [path.name for path in (elsewhere / "runs/points/code").iterdir()] == [str(job)]


def test_options_that_are_set_by_variables_are_refused(
    cluster: Cluster, elsewhere: Path, job_environment: Environment
) -> None:
    script = launcher("train_1node.sh")
    job = cluster.submit(
        "--ntasks-per-node=1", script, "--run", "x", folder=elsewhere, environment=job_environment
    )
    assert cluster.wait(job, 60)["ExitCode"] == "2:0"
    assert "RUN=... CONFIG=... sbatch slurm/train_1node.sh" in log_of(elsewhere)
    assert not (elsewhere / "runs").exists()


def test_a_job_without_a_new_checkpoint_gives_up(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
) -> None:
    state = cluster.wait(start(*[LOST] * 5, HG_MAX_RESTARTS="1"), 200)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", f"{GAVE_UP}:0"), log_of(elsewhere)
    assert state["Restarts"] == "1"
    assert "started 2 times without getting past checkpoint none: gave up" in log_of(elsewhere)


def test_a_preemption_does_not_count_as_a_restart(
    cluster: Cluster, start: Start, elsewhere: Path
) -> None:
    """However often, even before the first checkpoint; later losses count again."""
    job = start("waits", "waits", LOST, LOST, HG_MAX_RESTARTS="1")
    for restarts in range(2):
        cluster.wait_for(job, {"RUNNING"}, 120)
        wait_for_log(elsewhere, f"rank 1 start {restarts}")
        urgent = ("--partition=urgent", "--nodes=9", "--exclusive", "--output=urgent.txt")
        other = cluster.submit(*urgent, "--wrap=sleep 1", folder=elsewhere)
        cluster.wait(other, 120)
    state = cluster.wait(job, 120)
    ended = (state["JobState"], state["ExitCode"], state["Restarts"])
    assert ended == ("FAILED", f"{GAVE_UP}:0", "3"), log_of(elsewhere)


def test_a_cancelled_job_stays_cancelled(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
) -> None:
    job = start("waits")
    cluster.wait_for(job, {"RUNNING"})
    wait_for_log(elsewhere, "rank 0")
    cluster.command("scancel", str(job))
    state = cluster.wait(job, 60)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), log_of(elsewhere)
    last = json.loads((elsewhere / "run" / "jobs.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["requeued"], last["state"]) == ("end", False, "CANCELLED")
    assert read_status(elsewhere / "run").lines["state"] == f"not running: job {job} was cancelled"


def test_a_job_that_lost_a_node_restarts_on_others(
    cluster: Cluster,
    start: Start,
    elsewhere: Path,
) -> None:
    job = start("waits")
    cluster.wait_for(job, {"RUNNING"})
    nodes = cluster.state(job)["NodeList"]
    wait_for_log(elsewhere, "rank 1")
    lost = "n" + nodes.strip("n[]").split("-")[-1]
    cluster.lose(lost)
    try:
        cluster.wait_for(job, {"PENDING"}, 90)
        state = cluster.wait(job, 120)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log_of(elsewhere)
        assert lost not in cluster.command("scontrol", "show", "hostnames", state["NodeList"])
        lines = (elsewhere / "run" / "jobs.jsonl").read_text().splitlines()
        assert json.loads(lines[1])["requeued"] is True  # by Slurm or by the script
    finally:
        cluster.start_node(lost)
