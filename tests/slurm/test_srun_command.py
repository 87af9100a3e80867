"""The commands that launchers pass to `srun`, in a fake job: Slurm's commands are shell stubs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import launcher

SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" >>"$SRUN_ARGUMENTS"\n'
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show node") echo "NodeName=n1 NodeAddr=10.0.0.1" ;;
  "show job") echo "JobId=7 JobState=RUNNING PreemptTime=None EndTime=Unknown" ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch script; `srun` appends its arguments to the file srun-arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return {
        **inherited, "PATH": f"{tools}:{os.environ['PATH']}",
        "SRUN_ARGUMENTS": str(tmp_path / "srun-arguments"),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "1",
    }  # fmt: skip


def run(name: str, job: dict[str, str], folder: Path, **more: str) -> tuple[int, str]:
    """Run a launcher; return its exit code and output."""
    done = subprocess.run(
        ["bash", launcher(name)], cwd=folder, env=job | more, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def points(job: dict[str, str], folder: Path, *lines: str) -> list[str]:
    """Run a sweep in which every point succeeds; return the run folder of each line."""
    (folder / "points").write_text("\n".join(lines))
    folders: list[str] = []
    for number in range(1, len(lines) + 1):
        element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        code, output = run("sweep_array.sh", job, folder, POINTS="points", **element)
        assert code == 0 and "is finished" not in output, output
        finished = {p.parent.name for p in (folder / "runs" / "points").glob("*/finished")}
        (new,) = finished - set(folders)
        folders.append(new)
    return folders


def test_a_point_may_contain_spaces(job: dict[str, str], tmp_path: Path) -> None:
    """As a hierarchy does."""
    line = """model.hierarchy="2@1 8@3 2@1" 'training.stop_signals=["TERM"]' training.seed=3"""
    (name,) = points(job, tmp_path, line)
    words = (tmp_path / "srun-arguments").read_text().splitlines()
    sets = [value for key, value in zip(words, words[1:], strict=False) if key == "--set"]
    assert sets == 2 * [  # for the check and for the training
        "model.hierarchy=2@1 8@3 2@1", 'training.stop_signals=["TERM"]', "training.seed=3"
    ]  # fmt: skip
    assert name.startswith("model.hierarchy=2@1_8@3_2@1_training.stop_signals=__TERM___training.")


def test_every_point_has_its_own_folder(job: dict[str, str], tmp_path: Path) -> None:
    """Also if lines differ only in characters left out of the name, or late in a long line."""
    long = " ".join(f"model.key_{number}=1" for number in range(20))
    lines = ["data.path=a/b", "data.path=a:b", f"{long} x=1", f"{long} x=2", "training.seed=1"]
    names = points(job, tmp_path, *lines)
    assert len(set(names)) == 5 and names[-1] == "training.seed=1"
    assert max(map(len, names)) <= 120


def test_a_point_with_an_open_quote_is_refused(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "points").write_text("training.seed=1 model.hierarchy='6@1\n")
    code, output = run(
        "sweep_array.sh", job, tmp_path, POINTS="points", SLURM_ARRAY_TASK_ID="1"
    )  # fmt: skip
    assert code == 2 and "points, line 1 of overrides: cannot be read: training.seed=1" in output
    assert not (tmp_path / "srun-arguments").exists()


def test_scripts_of_a_site_may_read_unset_variables(job: dict[str, str], tmp_path: Path) -> None:
    """As scripts of conda and of modules do; the launchers themselves must not."""
    site = tmp_path / "site.sh"
    site.write_text('[ -z "$CONDA_BACKUP_CXX" ]\nHG_PYTHON=my-python\n')
    code, output = run("train_1node.sh", job, tmp_path, HG_SITE=str(site))
    assert code == 0, output
    assert "my-python" in (tmp_path / "srun-arguments").read_text().splitlines()
