"""Fixtures for the tests of the launchers: a cluster, a container, the environment of a job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import TINY
from tests.shared import ROOT
from tests.slurm.cluster import Cluster

SLURM_COMMANDS = {
    "sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol", "scrontab",
    "sdiag", "sinfo", "sprio", "squeue", "sreport", "srun", "sshare", "sstat", "strigger", "sview",
}  # fmt: skip
REFUSED = 99  # exit code of the fake container if it finds Slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster of 9 nodes for the session."""
    if os.geteuid() or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("needs root, and Debian's slurm-wlm and munge")
    # If the tests are terminated, the cluster is stopped all the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running = Cluster()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A command that runs another one with a PATH without Slurm's commands."""
    folder = tmp_path_factory.mktemp("container")
    tools = folder / "bin"
    tools.mkdir()
    for source in (Path(sys.executable).parent, Path("/usr/bin"), Path("/bin")):
        for tool in source.iterdir():
            if tool.name not in SLURM_COMMANDS and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    script = folder / "run"
    script.write_text(
        f"#!/bin/bash\nexport PATH={tools}\ncommand -v srun scontrol sbatch && exit {REFUSED}\n"
        'exec "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def job_environment(tmp_path: Path, container: Path) -> dict[str, str]:
    """Environment of jobs whose tasks are ranks on CPUs in the fake container."""
    site = tmp_path / "site.sh"
    site.write_text(f"HG_CONTAINER=({container})\n")
    scratch = tmp_path / "scratch"
    compiled = scratch / f"hg_scale-{os.getuid()}"
    compiled.mkdir(parents=True)
    # Reuse the compiled extension of this machine: compiling takes a minute.
    (compiled / "torch_extensions").symlink_to(Path.home() / ".cache" / "torch_extensions")
    (Path.home() / ".cache" / "torch_extensions").mkdir(parents=True, exist_ok=True)
    return {
        "HG_SITE": str(site),
        "HG_PYTHON": sys.executable,
        "HG_SCRATCH": str(scratch),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the repository to submit from, with a space in its name."""
    folder = tmp_path / "some where"
    folder.mkdir()
    return folder


@pytest.fixture
def tiny_3d(tmp_path: Path, corpus: Path) -> Path:
    """A configuration for 8 ranks: tensor 2 x pipeline 2 x data 2."""
    path = tmp_path / "tiny3d.json"
    parallel = {"tensor": 2, "pipeline": 2, "zero_stage": 1}
    tree = {**TINY, "data": {"path": str(corpus)}, "parallel": parallel, "checkpoint": {"every": 3}}
    path.write_text(json.dumps(tree))
    return path


def launcher(name: str) -> str:
    """Return the path of a script of slurm/."""
    return str(ROOT / "slurm" / name)


def log_of(folder: Path) -> str:
    """Return the logs of all jobs submitted from a folder."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))
