"""The fault injection itself: off by default, and refused outside tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.train import FAULTS, Fault
from tests.faults.worlds import run_with_fault
from tests.forks import Forks
from tests.shared import ROOT


def test_fault_injection_is_refused_outside_tests() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(
        [sys.executable, "tests/faults/train.py", "--config", "configs/quickstart.json"],
        env={**environment, "HG_FAULT": "die step=1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "faults are injected under pytest only\n"


def test_package_contains_no_fault_injection() -> None:
    for path in (ROOT / "hg_scale").rglob("*.py"):
        assert "HG_FAULT" not in path.read_text()


def test_fault_parses() -> None:
    assert Fault.parse("sleep rank=1 step=3") == Fault("sleep", 1, 3)
    assert Fault.parse("stall") == Fault("stall", None, 1)
    with pytest.raises(SystemExit, match="no fault 'slep'; there are " + ", ".join(FAULTS)):
        Fault.parse("slep")


def test_a_bug_ends_in_a_traceback(forks: Forks, config: Path, tmp_path: Path) -> None:
    found = run_with_fault(forks, "raise step=2", config, tmp_path, size=1)
    assert found.codes == [1] and "RuntimeError: an injected fault" in found.output


def test_out_of_memory_is_reported_in_one_line(forks: Forks, config: Path, tmp_path: Path) -> None:
    found = run_with_fault(forks, "memory rank=1 step=2", config, tmp_path)
    assert found.codes == [1, 1] and "Traceback" not in found.output
    line = "rank 1 ran out of memory at step 2: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert found.outputs[1].splitlines()[-1].startswith(f"{line}; choose a smaller ")
    assert f"rank 1 failed and ended all ranks: {line}" in found.outputs[0]
    assert "OutOfMemoryError" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
