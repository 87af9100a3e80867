"""The reference implementation's numbers, whole and in tensor-parallel slices."""

from __future__ import annotations

import subprocess
import sys

from tests.golden import BOUND, differences
from tests.shared import ROOT, shared


def test_all_files() -> None:
    files = sorted(shared("golden").glob("*.npz"))
    assert len(files) >= 5
    for file in files:
        worst, first = differences(file)
        assert worst <= BOUND, f"{file.name}: {worst:.2e} {first}"


def test_the_command_under_tensor_parallelism() -> None:
    files = sorted(map(str, shared("golden").glob("*.npz")))
    command = [sys.executable, "tests/golden.py", *files, "--tensor-parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok") == len(files)
