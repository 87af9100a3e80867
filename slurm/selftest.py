#!/usr/bin/env python
"""Test this machine in a few minutes, and print a table for the README.

    sbatch slurm/selftest.sh --golden FOLDER
    python slurm/selftest.py --processes 2

Checks golden files of the reference implementation (on the CPU), equal curves in all layouts that
the number of processes allows, a run that is killed and resumed in another layout, and the
bandwidth of an all-reduce. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

STEPS, KILL_AFTER = 20, 8
MODEL: dict[str, Any] = {"hierarchy": "2@1 4@2 2@1", "heads": 8, "vocab_size": 257}
SIZES = {
    "cuda": {"d_model": 512, "d_ff": 2048, "sequence_length": 1024},
    "cpu": {"d_model": 32, "d_ff": 64, "sequence_length": 64},
}
BOUNDS = {"bf16": 1e-2, "fp32": 1e-4}  # relative, as in tests/training/test_layouts.py
MEGABYTES = 256
RUN_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a run."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int

    def __str__(self) -> str:
        return f"TP{self.tensor} x PP{self.pipeline} x DP{self.data}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Row:
    """Result of a check: a row of the table."""

    check: str
    layout: str
    result: str
    ok: bool


def layouts(processes: int) -> list[Layout]:
    """Return one layout of each kind for `processes`; the first is pure data parallelism."""
    kinds = [Layout(1, 1, processes, 1)]
    if processes % 2 == 0:
        half = processes // 2
        kinds += [Layout(1, 1, processes, 3), Layout(2, 1, half, 1), Layout(1, 2, half, 1)]
    if processes % 4 == 0:
        kinds += [Layout(2, 2, processes // 4, 1), Layout(4, 1, processes // 4, 2)]
    return kinds


class SelfTest:
    """The checks; each returns or yields rows."""

    def __init__(self, folder: Path, processes: int, precision: str, device: str) -> None:
        self.folder, self.processes = folder, processes
        self.precision, self.device = precision, device
        self.config = folder / "selftest.json"
        self.reference: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Write a corpus of this package's sources, and a configuration."""
        corpus = self.folder / "corpus"
        script = str(ROOT / "data_prep" / "prepare_bytes.py")
        options = ["--input", str(ROOT / "hg_scale"), "--include", "*.py", "--output", str(corpus)]
        subprocess.run([sys.executable, script, *options], check=True, timeout=300)
        tree = {
            "model": MODEL | SIZES[self.device],
            "data": {"path": str(corpus)},
            "training": {
                "steps": STEPS,
                "global_batch_size": 2 * self.processes,
                "precision": self.precision,
                "validation_windows": 16,
            },
            "checkpoint": {"every": 4},
            "logging": {"every": 1},
        }
        self.config.write_text(json.dumps(tree))

    def golden(self, folder: Path | None) -> Iterator[Row]:
        """Compare with the logits of the reference implementation."""
        files = sorted(folder.glob("*.npz")) if folder else []
        check = "golden files of the reference implementation"
        if not files:
            yield Row(check, "CPU", "skipped: --golden names no folder of .npz files", True)
            return
        script = str(ROOT / "tests" / "golden.py")
        for tensor in (1, 2):
            command = [sys.executable, script, *map(str, files), "--tensor-parallel", str(tensor)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            result = f"{len(files)} files within 1e-5" if done.returncode == 0 else done.stdout
            yield Row(check, f"CPU, TP {tensor}", result, done.returncode == 0)

    def same_curves(self) -> Iterator[Row]:
        """Compare the curve of every layout with that of the first."""
        for number, layout in enumerate(layouts(self.processes)):
            run = self.folder / f"layout-{number}"
            code = self.start(run, layout).wait()
            if code:
                yield Row(
                    "training",
                    str(layout),
                    f"exit code {code}: {last_line(run / 'terminal.log')}",
                    False,
                )
                continue
            records = curve(run)
            self.reference = self.reference or records
            rate = sorted(r["tokens_per_second"] for r in records[5:])[len(records[5:]) // 2]
            yield self.compare("same curve", str(layout), records, f", {rate:,.0f} tokens/s")

    def kill_and_resume(self) -> Row:
        """Kill all processes of a run at once, and resume it in another layout."""
        run, kinds = self.folder / "killed", layouts(self.processes)
        ranks = self.start(run, kinds[0])
        while len(curve(run)) < KILL_AFTER and ranks.running():
            time.sleep(0.02)
        ranks.kill()
        reached = len(curve(run))
        code = self.start(run, kinds[-1]).wait()
        layout = f"{kinds[0]} -> {kinds[-1]}"
        if code:
            return Row(
                "killed, resumed",
                layout,
                f"exit code {code}: {last_line(run / 'terminal.log')}",
                False,
            )
        return self.compare("killed, resumed", layout, curve(run), f", killed after step {reached}")

    def compare(self, check: str, layout: str, records: list[dict[str, Any]], note: str) -> Row:
        """Compare the losses with those of the first run."""
        losses = [r["loss"] for r in records]
        expected = [r["loss"] for r in self.reference]
        if len(losses) != len(expected):
            return Row(check, layout, f"{len(losses)} steps, expected {len(expected)}", False)
        largest = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        bound = BOUNDS[self.precision]
        result = f"largest relative difference of a loss {largest:.1e} (bound {bound:.0e}){note}"
        return Row(check, f"{layout}, {self.precision}", result, largest <= bound)

    def bandwidth(self) -> Row:
        """Measure an all-reduce over all processes."""
        check, layout = f"all-reduce of {MEGABYTES} MiB", f"{self.processes} processes"
        log = self.folder / "bandwidth.log"
        code = Ranks(self.processes, log, __file__, "--bandwidth").wait()
        return Row(check, layout, last_line(log), code == 0)

    def start(self, run: Path, layout: Layout) -> Ranks:
        """Start training in a layout."""
        overrides = {
            "parallel.tensor": layout.tensor,
            "parallel.pipeline": layout.pipeline,
            "parallel.zero_stage": layout.zero_stage,
        }
        options = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
        run.mkdir(exist_ok=True)
        script = str(ROOT / "hg_scale" / "train.py")
        options += ["--config", str(self.config), "--run", str(run)]
        return Ranks(self.processes, run / "terminal.log", script, *options)


class Ranks:
    """`python ARGUMENTS` as the ranks of a world on this machine, which can be killed all at once.

    Not started by torchrun, since its ranks would survive it.
    """

    def __init__(self, size: int, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._deadline = time.monotonic() + RUN_TIMEOUT
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with log.open("ab") as output:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, *arguments], stdout=output, stderr=output,
                    env=os.environ | world | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(size)
            ]  # fmt: skip

    def running(self) -> bool:
        """Whether no rank has ended and the timeout has not passed."""
        in_time = time.monotonic() <= self._deadline
        return in_time and all(process.poll() is None for process in self._processes)

    def wait(self) -> int:
        """Return the highest exit code; kill ranks that run a minute longer than the first."""
        while self.running():
            time.sleep(0.05)
        deadline = time.monotonic() + 60
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        return max(abs(process.returncode) for process in self._processes)

    def kill(self) -> None:
        """Kill all ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def curve(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's logged steps so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def measure_bandwidth() -> None:
    """Measure an all-reduce, the best of five; runs on every rank."""
    import torch
    import torch.distributed as dist

    from hg_scale.parallel.launch import Launch
    from hg_scale.parallel.mesh import start_processes

    device = start_processes(Launch.from_environment())
    data = torch.ones(MEGABYTES * 2**18, device=device)
    seconds = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        float(data[0])  # wait for the device
        seconds.append(time.perf_counter() - start)
        data.fill_(1)
    size = dist.get_world_size()
    rate = data.numel() * 4 / min(seconds[1:]) / 1e9
    if dist.get_rank() == 0:
        print(f"{rate:.3g} GB/s, {rate * 2 * (size - 1) / size:.3g} GB/s per link ({device.type})")
    dist.destroy_process_group()


def machine() -> str:
    """Describe the machine that was tested."""
    import torch

    count = torch.cuda.device_count()
    device = (
        f"{count} x {torch.cuda.get_device_name(0)}" if count else f"{os.cpu_count()} CPU cores"
    )
    cuda = f", CUDA {torch.version.cuda}" if count else ""
    return f"{device}, torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def main() -> int:
    """Run all checks; return 1 if one fails."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--processes", type=int, default=torch.cuda.device_count() or 2, metavar="N",
        help="processes to train with (default: one per GPU, or 2)")  # fmt: skip
    add("--golden", type=Path, metavar="FOLDER", help="golden files, *.npz")
    add("--precision", choices=sorted(BOUNDS), default="bf16" if torch.cuda.is_available() else
        "fp32", help="training precision (default: bf16 on GPUs, fp32 on CPUs)")  # fmt: skip
    add("--bandwidth", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bandwidth:
        measure_bandwidth()
        return 0
    os.environ["PYTHONPATH"] = str(ROOT)  # for all subprocesses
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hg-selftest-") as folder:
        test = SelfTest(Path(folder), options.processes, options.precision, device)
        test.prepare()
        rows: list[Row] = []

        def add_row(row: Row) -> None:
            rows.append(row)
            print(f"{'ok' if row.ok else 'FAILED':6}  {row.check}: {row.layout}: {row.result}",
                  flush=True)  # fmt: skip

        for row in test.golden(options.golden):
            add_row(row)
        for row in test.same_curves():
            add_row(row)
        add_row(test.kill_and_resume())
        add_row(test.bandwidth())
    print(f"\n{machine()}\n\n| check | layout | result |\n| --- | --- | --- |")
    for row in rows:
        result = row.result if row.ok else f"FAILED: {row.result}"
        print(f"| {row.check} | {row.layout} | {result} |")
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
