"""The quickstart of the Makefile: DeepSpeed's warnings on a CPU are off, those on a GPU are on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.shared import ROOT


def quickstart_command(gpu: str) -> str:
    """Return the training command of `make quickstart`; `gpu`: the device files it finds."""
    done = subprocess.run(
        ["make", "--dry-run", "quickstart", f"GPU={gpu}"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if "hg_scale/train.py" in line]
    return line


def test_quickstart_selects_the_cpu_only_without_a_gpu() -> None:
    assert quickstart_command("").startswith("DS_ACCELERATOR=cpu ")
    assert "DS_ACCELERATOR" not in quickstart_command("/dev/nvidia0")


@pytest.mark.parametrize(("setting", "warnings"), [({"DS_ACCELERATOR": "cpu"}, 0), ({}, 1)])
def test_deepspeed_warns_unless_the_cpu_is_selected(setting: dict[str, str], warnings: int) -> None:
    """If this fails after an update of DeepSpeed, look for another way to avoid its warning."""
    inherited = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", "from deepspeed.accelerator import get_accelerator as a; a()"],
        env=inherited | setting | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert (done.stdout + done.stderr).count("Setting accelerator to CPU") == warnings
