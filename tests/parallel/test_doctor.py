"""Each check of `hg-scale doctor`, on a good machine and on one with the problem."""

from __future__ import annotations

import os
import resource
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from hg_scale.commands.main import main
from hg_scale.parallel import doctor
from hg_scale.parallel.doctor import Finding


def test_the_command_prints_one_line_per_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "WRITE_BYTES", 2**20)
    code = main(["doctor", "--run", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    topics = [line[7:20].strip() for line in lines if not line.startswith(" ")]
    assert topics == [
        "python", "libraries", "cuda", "GPUs", "nccl", "/dev/shm", "memlock", "cpu affinity",
        "run folder", "caches", "compiler", "mpi", "slurm",
    ]  # fmt: skip
    assert f"torch {version('torch')}" in lines[1] and "megatron-core" in lines[1]
    assert code == int(any(line.startswith("wrong") for line in lines))
    assert not list(tmp_path.iterdir())


def test_versions_out_of_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.version
    found = {"torch": "2.1.0", "deepspeed": "0.20.1"}
    monkeypatch.setattr(doctor, "version", lambda name: found.get(name) or known(name))
    finding = doctor.libraries()
    assert finding.state == "wrong" and "constraints.txt" in finding.remedy
    assert "torch 2.1.0 is not >=2.8" in finding.message
    assert "deepspeed 0.20.1 is not <0.20,>=0.19" in finding.message


@pytest.mark.parametrize(
    ("driver", "built", "usable", "state", "text"),
    [
        (None, None, False, "note", "CPU training only"),
        ("570.1", None, False, "wrong", "built for CPUs"),
        (None, "12.8", False, "note", "no NVIDIA driver"),
        ("450.2", "13.0", False, "wrong", "cannot use it"),
        ("570.1", "12.8", True, "ok", "driver 570.1"),
    ],
)
def test_driver_and_torch(
    monkeypatch: pytest.MonkeyPatch, driver: Any, built: Any, usable: bool, state: str, text: str
) -> None:
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    finding = doctor.torch_and_driver()
    assert finding.state == state and text in finding.message
    assert bool(finding.remedy) == (state == "wrong" or (built and not driver) or False)


def test_allocated_gpus_that_torch_does_not_see_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert doctor.gpus().state == "wrong"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    finding = doctor.gpus()
    assert (finding.state, finding.message) == ("note", "none")
    assert "DS_ACCELERATOR=cpu" in finding.remedy


def test_small_limits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(64 * 2**20, 0, 64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert doctor.shared_memory().state == "wrong"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert doctor.memlock().message == "64 KiB" and doctor.memlock().state in ("note", "wrong")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert doctor.memlock().state == "ok"


def test_a_slow_or_unwritable_run_folder_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "WRITE_BYTES", 2**20)
    assert doctor.write_rate(tmp_path / "not" / "created").message.startswith(f"{tmp_path}: ")
    monkeypatch.setattr(doctor, "SLOW_WRITE", float("inf"))
    assert doctor.write_rate(tmp_path).state == "wrong"
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", _refuse)
    finding = doctor.write_rate(tmp_path)
    assert (finding.state, finding.message) == ("wrong", f"{tmp_path}: Read-only file system")


def _refuse(**_: Any) -> Any:
    raise OSError(30, os.strerror(30))


def test_caches_on_a_shared_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_file_system", lambda path: "lustre")
    finding = doctor.caches()
    assert finding.state == "note" and "HG_SCRATCH" in finding.remedy


def test_nccl_socket_ifname_is_matched_as_nccl_does() -> None:
    assert doctor._selects("ib", "ib0") and doctor._selects("=ib0,eth", "ib0")
    assert not doctor._selects("=ib", "ib0") and not doctor._selects("eth", "ib0")


def test_the_error_of_srun_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho srun: error: no controller >&2; exit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = doctor.slurm()
    assert finding.state == "note" and "no controller" in finding.message
    srun.write_text('#!/bin/sh\n[ $1 = --version ] && echo slurm 23.11 || echo "pmix none" >&2\n')
    assert doctor.slurm().message == "slurm 23.11; srun --mpi: none, pmix"


def test_commands_that_hang_are_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as an MPI that waits for its network, or srun without a controller."""
    for name in ("srun", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 600\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT", 0.2)
    assert doctor.slurm() == Finding("slurm", "note", "srun fails: no answer within 0.2 s")
    finding = doctor.mpi()
    assert finding.message == "mpi4py loads no MPI: no answer within 0.2 s" and finding.remedy
