"""What launchers hand to `srun`, in a pretended job: Slurm's commands are a few lines of shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import launcher

SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" >>"$TOLD"\n'
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show node") echo "NodeName=n1 NodeAddr=10.0.0.1" ;;
  "show job") echo "JobId=7 JobState=RUNNING PreemptTime=None EndTime=Unknown" ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script; all words of `srun` are appended to the file `TOLD`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    known = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return {
        **known, "PATH": f"{tools}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told"),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "1",
    }  # fmt: skip


def run(name: str, job: dict[str, str], folder: Path, **more: str) -> tuple[int, str]:
    """The exit code of a launcher, and what it said."""
    done = subprocess.run(
        ["bash", launcher(name)], cwd=folder, env=job | more, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def points(job: dict[str, str], folder: Path, *lines: str) -> list[str]:
    """The run folders of a sweep, line by line; each point ends well."""
    (folder / "points").write_text("\n".join(lines))
    before: list[str] = []
    for number in range(1, len(lines) + 1):
        place = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        code, said = run("sweep_array.sh", job, folder, POINTS="points", **place)
        assert code == 0 and "is finished" not in said, said
        there = {p.parent.name for p in (folder / "runs" / "points").glob("*/finished")}
        (new,) = there - set(before)
        before.append(new)
    return before


def test_a_point_may_hold_blanks(job: dict[str, str], tmp_path: Path) -> None:
    """A hierarchy does."""
    line = """model.hierarchy="2@1 8@3 2@1" 'training.stop_signals=["TERM"]' training.seed=3"""
    (name,) = points(job, tmp_path, line)
    words = (tmp_path / "told").read_text().splitlines()
    sets = [value for key, value in zip(words, words[1:], strict=False) if key == "--set"]
    assert sets == 2 * [  # of the check, and of the training
        "model.hierarchy=2@1 8@3 2@1", 'training.stop_signals=["TERM"]', "training.seed=3"
    ]  # fmt: skip
    assert name.startswith("model.hierarchy=2@1_8@3_2@1_training.stop_signals=__TERM___training.")


def test_every_point_has_a_folder_of_its_own(job: dict[str, str], tmp_path: Path) -> None:
    """Also those that differ in what no folder is named by, or late in a long line."""
    long = " ".join(f"model.key_{number}=1" for number in range(20))
    lines = ["data.path=a/b", "data.path=a:b", f"{long} x=1", f"{long} x=2", "training.seed=1"]
    names = points(job, tmp_path, *lines)
    assert len(set(names)) == 5 and names[-1] == "training.seed=1"
    assert max(map(len, names)) <= 120


def test_a_point_with_an_open_quote_is_refused(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "points").write_text("training.seed=1 model.hierarchy='6@1\n")
    code, said = run(
        "sweep_array.sh", job, tmp_path, POINTS="points", SLURM_ARRAY_TASK_ID="1"
    )  # fmt: skip
    assert code == 2 and "points, line 1 of overrides: cannot be read: training.seed=1" in said
    assert not (tmp_path / "told").exists()


def test_what_a_site_sources_may_leave_variables_unset(job: dict[str, str], tmp_path: Path) -> None:
    """As scripts of conda and of modules do; the launchers themselves may not."""
    site = tmp_path / "site.sh"
    site.write_text('[ -z "$CONDA_BACKUP_CXX" ]\nHG_PYTHON=my-python\n')
    code, said = run("train_1node.sh", job, tmp_path, HG_SITE=str(site))
    assert code == 0, said
    assert "my-python" in (tmp_path / "told").read_text().splitlines()
