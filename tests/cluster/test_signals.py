"""Signals to the process group of a launcher."""

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
def test_a_terminated_process_group_saves(config: Path, tmp_path: Path, name: str) -> None:
    """Terminated as by a scheduler; the launchers have exit codes of their own."""
    commands = {"python": (PYTHON,)} | launchers()
    if name not in commands:
        pytest.skip(f"{name} is not installed")
    command = commands[name]
    run = tmp_path / "run"
    options = ("--config", str(config), "--run", str(run), "--set", "training.steps=1000000")
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(ROOT / "hg_scale" / "train.py"), *options],
            stdout=file, stderr=file, cwd=ROOT, env=dict(os.environ), start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(records(run)) < 3:
            assert time.monotonic() < end and process.poll() is None, output.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(timeout=60)
        while _runs(process.pid):  # `deepspeed` itself exits at once
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert code == REQUEUE if name == "python" else code != 0
    (step,) = re.findall(r"signal TERM: saved at step (\d+), to be started again", text)
    latest = (run / "checkpoints" / "latest").read_text()
    assert latest == f"step-{int(step):08}\n" and int(step) >= 3


def _runs(group: int) -> bool:
    """Whether a process of a group is running; zombies do not count."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            running = process.status() != psutil.STATUS_ZOMBIE
            if running and os.getpgid(process.pid) == group:
                return True
    return False
