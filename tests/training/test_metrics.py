"""The metrics file after crashes and resumes, the time of a step by phase, memory usage."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hg_scale.training.metrics import MetricsLog, StepTimer, gpu_usage, memory_usage
from tests.disks import Mount, mount

__all__ = ["mount"]


def read(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


def write(run_dir: Path, *numbers: int, resume_step: int = 0) -> Path:
    with MetricsLog(run_dir, resume_step) as log:
        for step in numbers:
            log.write({"step": step, "loss": 1 / step})
    return log.path


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run")
    log.write({"step": 1, "loss": 2.5})
    (record,) = read(log.path)
    assert record["step"] == 1 and record["loss"] == 2.5 and record["time"] > 1.7e9
    log.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": math.nan, "norms": [math.inf, np.float32("nan"), 1.0]})
    (record,) = read(log.path)
    assert record["loss"] is None and record["norms"] == [None, None, 1.0]


def test_numbers_of_numpy_are_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": np.int64(3), "loss": np.float64(0.5)})
    assert steps(log.path) == [3]


def test_a_resumed_run_drops_the_steps_it_will_repeat(tmp_path):
    path = write(tmp_path, 10, 20, 30, 40)
    write(tmp_path, 30, 40, 50, resume_step=20)
    assert steps(path) == [10, 20, 30, 40, 50]


def test_a_run_from_scratch_drops_all_steps(tmp_path):
    path = write(tmp_path, 10, 20)
    write(tmp_path, 10)
    assert steps(path) == [10]


@pytest.mark.parametrize("torn", [b'{"step": 30, "lo', b"\0\0\0\0", b"7", b'{"step": 20'])
def test_a_partial_last_line_is_dropped(tmp_path, torn):
    path = write(tmp_path, 10, 20)
    complete = path.read_bytes()
    path.write_bytes(complete + torn)
    MetricsLog(tmp_path, resume_step=20).close()
    assert path.read_bytes() == complete


def test_a_complete_last_line_without_a_newline_is_kept(tmp_path):
    path = write(tmp_path, 10, 20)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, 30, resume_step=20)
    assert steps(path) == [10, 20, 30]


def test_a_file_that_needs_no_change_is_not_rewritten(tmp_path):
    path = write(tmp_path, 10, 20)
    inode = path.stat().st_ino
    write(tmp_path, 30, resume_step=20)
    assert path.stat().st_ino == inode
    assert not list(tmp_path.glob("*.tmp"))


def test_a_killed_run_leaves_at_most_one_partial_line(tmp_path):
    code = (
        "import os; from pathlib import Path; from hg_scale.training.metrics import MetricsLog\n"
        f"log = MetricsLog(Path({str(tmp_path)!r}))\n"
        "for step in range(1, 101): log.write({'step': step})\n"
        "log._file.write(b'{\"step\": 1'); log._file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    MetricsLog(tmp_path, resume_step=100).close()
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 101))


class Clock:
    """A clock that only `wait` advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_a_step_is_split_into_data_compute_and_rest():
    clock = Clock()
    timer = StepTimer(clock)
    for _ in range(2):
        with timer.measure("data"):
            clock.wait(1)
        with timer.measure("compute"):
            clock.wait(6)
            with timer.measure("data"):
                clock.wait(2)
        clock.wait(1)
        timer.count_step(tokens=500)
    with timer.measure("paused"):
        clock.wait(100)
    assert timer.collect() == {
        "step_seconds": 10,
        "data_seconds": 3,
        "compute_seconds": 6,
        "rest_seconds": 1,
        "tokens_per_second": 50,
    }
    assert timer.collect() == {}


def test_an_error_in_a_phase_returns_to_the_outer_phase():
    clock = Clock()
    timer = StepTimer(clock)
    with pytest.raises(KeyError), timer.measure("compute"):
        clock.wait(3)
        raise KeyError
    clock.wait(1)
    timer.count_step(tokens=8)
    averages = timer.collect()
    assert averages["compute_seconds"] == 3 and averages["rest_seconds"] == 1


def test_memory_of_this_process_is_plausible():
    memory = memory_usage()
    assert 0.01 < memory["memory_gib"] <= memory["peak_memory_gib"] < 1024


def test_memory_follows_an_allocation():
    before = memory_usage()["memory_gib"]
    block = np.ones(2**25)  # 0.25 GiB
    after = memory_usage()["memory_gib"]
    assert after - before > 0.2
    del block


def test_logging_modules_import_neither_torch_nor_wandb():
    code = (
        "import sys; import hg_scale.training.metrics, hg_scale.training.schedule, "
        "hg_scale.training.console, hg_scale.training.wandb_log; "
        "sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_full_disk_loses_lines_and_warns_once(tmp_path: Path, mount: Mount) -> None:
    """Writing continues when there is space again, and every line is complete or dropped."""
    run = tmp_path / "disk"
    mount(run, 64 << 10)
    warnings: list[str] = []
    log = MetricsLog(run, warn=warnings.append)
    log.write({"step": 1})
    filler = run / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass
    for step in range(2, 400):
        log.write({"step": step, "loss": 1 / 3})
    assert len(warnings) == 1 and "metrics.jsonl: lines are lost" in warnings[0]
    filler.unlink()
    log.write({"step": 400})
    log.close()
    with MetricsLog(run, 400) as log:
        found = steps(log.path)
    assert found[0] == 1 and found[-1] == 400 and found == sorted(found)
    assert len(found) < 400


def test_the_usage_of_a_gpu_is_in_the_units_of_the_table(monkeypatch):
    class Cuda:
        is_available = is_initialized = staticmethod(lambda: True)
        utilization = staticmethod(lambda: 87)  # percent
        power_draw = staticmethod(lambda: 412_500)  # milliwatts

        @staticmethod
        def temperature():
            raise RuntimeError("this GPU has no such sensor")

    torch = types.SimpleNamespace(cuda=Cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gpu_usage() == {"gpu_utilisation": 0.87, "gpu_power_watts": 412.5}
    Cuda.is_initialized = staticmethod(lambda: False)
    assert gpu_usage() == {}
