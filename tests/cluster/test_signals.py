"""Signals to whatever has started the ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hg_scale.exit_codes import REQUEUE
from tests.runs import records
from tests.shared import ROOT
from tests.test_train import PYTHON, launchers

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("name", ["python", "torchrun", "deepspeed"])
def test_a_process_group_that_is_ended_saves(config: Path, tmp_path: Path, name: str) -> None:
    """As a scheduler ends it; launchers end with a code of their own."""
    known = {"python": (PYTHON,)} | launchers()
    if name not in known:
        pytest.skip(f"{name} is not installed")
    command = known[name]
    run = tmp_path / "run"
    words = ("--config", str(config), "--run", str(run), "--set", "training.steps=1000000")
    output = tmp_path / "told"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(ROOT / "hg_scale" / "train.py"), *words],
            stdout=file, stderr=file, cwd=ROOT, env=dict(os.environ), start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(records(run)) < 3:
            assert time.monotonic() < end and process.poll() is None, output.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(timeout=60)
        while _runs(process.pid):  # `deepspeed` itself ends at once
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    told = output.read_text()
    assert code == REQUEUE if name == "python" else code != 0
    (step,) = re.findall(r"signal TERM: saved at step (\d+), to be started again", told)
    latest = (run / "checkpoints" / "latest").read_text()
    assert latest == f"step-{int(step):08}\n" and int(step) >= 3


def _runs(group: int) -> bool:
    """Whether a process of a group is at work; one that only waits to be reaped is not."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            at_work = process.status() != psutil.STATUS_ZOMBIE
            if at_work and os.getpgid(process.pid) == group:
                return True
    return False
