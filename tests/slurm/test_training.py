"""Training, preparation and evaluation by the unchanged launchers, under a real Slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runs import curve, records, train
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import launcher, log_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]
Environment = dict[str, str]


def test_tensor_pipeline_and_data_parallel_training_on_eight_nodes(
    cluster: Cluster, job_environment: Environment, elsewhere: Path, tiny_3d: Path, tmp_path: Path
) -> None:
    """From another folder, in containers without Slurm: the curve equals that of one process."""
    alone = tmp_path / "alone"
    flat = ("--set", "parallel.tensor=1", "--set", "parallel.pipeline=1")
    done = train("--config", str(tiny_3d), "--run", str(alone), *flat)
    assert done.returncode == 0, done.stdout + done.stderr

    environment = {**job_environment, "CONFIG": str(tiny_3d)}
    words = ("--ntasks-per-node=1", launcher("train_64gpu.sh"))
    job = cluster.submit(*words, folder=elsewhere, environment=environment)
    state = cluster.wait(job, 400)
    log = log_of(elsewhere)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert state["NumNodes"] == "8"

    run = elsewhere / "runs" / "tiny3d"
    np.testing.assert_allclose(curve(run), curve(alone), rtol=1e-4)
    manifest = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    layout = {key: manifest["layout"][key] for key in ("tensor", "pipeline", "data")}
    assert layout == {"tensor": 2, "pipeline": 2, "data": 2}
    assert len(list((run / "logs").glob("rank-*.log"))) == 8

    steps = [line for line in log.splitlines() if line.startswith("step ")]
    assert len(steps) == 7, log  # one line per step, and one about the checkpoint
    assert "8 processes = tensor 2 x pipeline 2 x data 2" in log
    assert "64 GPUs but 8 tasks" in log
    assert f"code {run}/code/{job}" in log
    assert (run / "code" / str(job) / "tiny3d.json").read_text() == tiny_3d.read_text()
    journal = [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]
    assert [(line["event"], line["start"]) for line in journal] == [("start", 1), ("end", 1)]
    assert Path(journal[0]["log"]).read_text() == log


def test_the_check_fails_before_any_rank_starts(
    cluster: Cluster, job_environment: Environment, elsewhere: Path, tiny_3d: Path, tmp_path: Path
) -> None:
    """With the reason, within seconds. tests/training/test_check.py tests the check itself."""
    missing = f"data.path={tmp_path / 'nowhere'}"
    problems = {
        "parallel.tensor": ("--nodes=3", "--set", "parallel.pipeline=2"),
        "data.path": ("--nodes=8", "--set", missing),
    }
    for reason, (nodes, *arguments) in problems.items():
        environment = {**job_environment, "CONFIG": str(tiny_3d), "RUN": str(tmp_path / reason)}
        words = (nodes, "--ntasks-per-node=1", launcher("train_64gpu.sh"), *arguments)
        job = cluster.submit(*words, folder=elsewhere, environment=environment)
        state = cluster.wait(job, 60)
        log = (elsewhere / f"hg-train-{job}.log").read_text()
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
        assert reason in log and "the configuration cannot be used: not requeued" in log
        assert "Traceback" not in log and not (tmp_path / reason / "metrics.jsonl").exists()
        hours, minutes, seconds = map(int, state["RunTime"].split(":"))
        assert 3600 * hours + 60 * minutes + seconds < 15


def test_sweep_array_runs_every_point_once(
    cluster: Cluster, job_environment: Environment, elsewhere: Path, config: Path
) -> None:
    points = elsewhere / "points.txt"
    rates = ["1e-3", "2e-3", "3e-3", "4e-3"]
    points.write_text("# four rates\n" + "".join(f"optimizer.learning_rate={r}\n\n" for r in rates))
    environment = {**job_environment, "CONFIG": str(config), "POINTS": "points.txt"}
    small = ("--ntasks-per-node=1", "--gres=gpu:1", "--array=1-4%2", launcher("sweep_array.sh"))
    for finished in (False, True):
        job = cluster.submit(*small, "--stop-at", "2", folder=elsewhere, environment=environment)
        for number in range(1, 5):
            state = cluster.wait(f"{job}_{number}", 300)
            log = (elsewhere / f"hg-sweep-{job}-{number}.log").read_text()
            assert state["JobState"] == "COMPLETED", log
            assert ("is finished" in log) == finished
    for rate in rates:
        run = elsewhere / "runs" / "points" / f"optimizer.learning_rate={rate}"
        assert [r["learning_rate"] for r in records(run) if "loss" in r] != []
        assert json.loads((run / "config.json").read_text())["optimizer"]["learning_rate"] == float(
            rate
        )
    assert len({curve(path)[1] for path in (elsewhere / "runs" / "points").glob("opt*")}) == 4


def test_prepare_data_uses_all_tasks(
    cluster: Cluster, job_environment: Environment, elsewhere: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"text {number} " * 200)
    words = ("--nodes=2", "--ntasks-per-node=2", "--mem-per-cpu=100M", launcher("prepare_data.sh"))
    options = ("prepare_text.py", "--input", str(texts), "--output", "shards")
    job = cluster.submit(*words, *options, folder=elsewhere, environment=job_environment)
    state = cluster.wait(job, 240)
    assert state["JobState"] == "COMPLETED", log_of(elsewhere)
    assert state["NumTasks"] == "4"
    index = json.loads((elsewhere / "shards" / "index.json").read_text())
    assert sum(split["documents"] for split in index["splits"].values()) == 30


def test_evaluate_scores_a_run(
    cluster: Cluster, job_environment: Environment, elsewhere: Path, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train("--config", str(config), "--run", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    words = ("--mem=1G", launcher("evaluate.sh"), str(run), "--split", "validation")
    options = ("--windows", "8", "--json", "score.json")
    job = cluster.submit(*words, *options, folder=elsewhere, environment=job_environment)
    assert cluster.wait(job, 240)["JobState"] == "COMPLETED", log_of(elsewhere)
    scores = json.loads((elsewhere / "score.json").read_text())
    assert [score["step"] for score in scores] == [6]  # the only checkpoint
    bits = scores[-1]["bits_per_byte"]
    validations = [r for r in records(run) if "validation_bits_per_byte" in r]
    assert bits == pytest.approx(validations[-1]["validation_bits_per_byte"], rel=1e-5)


def test_ranks_under_plain_srun(cluster: Cluster, elsewhere: Path) -> None:
    """Without the launchers: ranks come from `srun` alone, and a batch script is one process."""
    script = elsewhere / "plain.sh"
    code = (
        "import os; from hg_scale.parallel.launch import Launch;"
        "launch = Launch.from_environment();"
        "launch.world_size > 1 and launch.set_master_address();"
        "print('launch', launch.rank, launch.world_size, launch.local_rank,"
        " launch.local_world_size, os.environ.get('MASTER_ADDR'))"
    )
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --output=plain.log\n"
        f'run() {{ "$@" {sys.executable} -c "{code}"; }}\nrun env\nrun srun\n'
    )
    environment = {"PYTHONPATH": str(Path(launcher("")).parent)}
    job = cluster.submit(str(script), folder=elsewhere, environment=environment)
    cluster.wait(job, 60)
    lines = (elsewhere / "plain.log").read_text().splitlines()
    nodes = cluster.state(job)["NodeList"]
    first = nodes.replace("[", "").split("-")[0]
    assert sorted(lines) == [
        "launch 0 1 0 1 None",
        *(f"launch {rank} 4 {rank % 2} 2 {first}" for rank in range(4)),
    ]
