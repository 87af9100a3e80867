#!/usr/bin/env python
"""Is all well on this machine? A few minutes, and a table for the README.

    sbatch slurm/selftest.sh --golden FOLDER
    python slurm/selftest.py --processes 2

Golden files of the reference implementation (on the CPU), the same curve in every layout that the
number of processes allows, a run that is killed and goes on in another layout, and the rate of an
all-reduce. Exits 1 where one of them is not as it must be.
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
PATIENCE = 300.0  # seconds that a run may take


@dataclass(frozen=True)
class Layout:
    """Of the runs that are compared."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int

    def __str__(self) -> str:
        return f"TP{self.tensor} x PP{self.pipeline} x DP{self.data}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    where: str
    state: str
    ok: bool


def layouts(processes: int) -> list[Layout]:
    """One of each kind that so many processes allow; the first is data parallelism alone."""
    found = [Layout(1, 1, processes, 1)]
    if processes % 2 == 0:
        half = processes // 2
        found += [Layout(1, 1, processes, 3), Layout(2, 1, half, 1), Layout(1, 2, half, 1)]
    if processes % 4 == 0:
        found += [Layout(2, 2, processes // 4, 1), Layout(4, 1, processes // 4, 2)]
    return found


class SelfTest:
    """The parts, each a row or several."""

    def __init__(self, folder: Path, processes: int, precision: str, device: str) -> None:
        self.folder, self.processes = folder, processes
        self.precision, self.device = precision, device
        self.config = folder / "selftest.json"
        self.reference: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """This package's own sources as a corpus, and a configuration."""
        corpus = self.folder / "corpus"
        script = str(ROOT / "data_prep" / "prepare_bytes.py")
        words = ["--input", str(ROOT / "hg_scale"), "--include", "*.py", "--output", str(corpus)]
        subprocess.run([sys.executable, script, *words], check=True, timeout=300)
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
        """The reference implementation's numbers."""
        files = sorted(folder.glob("*.npz")) if folder else []
        what = "golden files of the reference implementation"
        if not files:
            yield Row(what, "CPU", "skipped: --golden names no folder of .npz files", True)
            return
        script = str(ROOT / "tests" / "golden.py")
        for tensor in (1, 2):
            words = [sys.executable, script, *map(str, files), "--tensor-parallel", str(tensor)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
            state = f"{len(files)} files within 1e-5" if done.returncode == 0 else done.stdout
            yield Row(what, f"CPU, TP {tensor}", state, done.returncode == 0)

    def same_curves(self) -> Iterator[Row]:
        """Every layout against the first."""
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
        """A run that loses all its processes at once, and goes on in another layout."""
        run, kinds = self.folder / "killed", layouts(self.processes)
        ranks = self.start(run, kinds[0])
        while len(curve(run)) < KILL_AFTER and ranks.running():
            time.sleep(0.02)
        ranks.kill()
        reached = len(curve(run))
        code = self.start(run, kinds[-1]).wait()
        where = f"{kinds[0]} -> {kinds[-1]}"
        if code:
            return Row(
                "killed, resumed",
                where,
                f"exit code {code}: {last_line(run / 'terminal.log')}",
                False,
            )
        return self.compare("killed, resumed", where, curve(run), f", killed after step {reached}")

    def compare(self, what: str, where: str, records: list[dict[str, Any]], more: str) -> Row:
        """Losses against those of the first run."""
        ours = [r["loss"] for r in records]
        theirs = [r["loss"] for r in self.reference]
        if len(ours) != len(theirs):
            return Row(what, where, f"{len(ours)} steps, expected {len(theirs)}", False)
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        bound = BOUNDS[self.precision]
        verdict = f"largest relative difference of a loss {worst:.1e} (bound {bound:.0e}){more}"
        return Row(what, f"{where}, {self.precision}", verdict, worst <= bound)

    def bandwidth(self) -> Row:
        """An all-reduce of all processes."""
        what, where = f"all-reduce of {MEGABYTES} MiB", f"{self.processes} processes"
        log = self.folder / "bandwidth.log"
        code = Ranks(self.processes, log, __file__, "--bandwidth").wait()
        return Row(what, where, last_line(log), code == 0)

    def start(self, run: Path, layout: Layout) -> Ranks:
        """Train."""
        sets = {
            "parallel.tensor": layout.tensor,
            "parallel.pipeline": layout.pipeline,
            "parallel.zero_stage": layout.zero_stage,
        }
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        run.mkdir(exist_ok=True)
        script = str(ROOT / "hg_scale" / "train.py")
        place = ("--config", str(self.config), "--run", str(run))
        return Ranks(self.processes, run / "terminal.log", script, *place, *words)


class Ranks:
    """`python WORDS` as the ranks of a world on this machine.

    Not by torchrun, whose death its ranks outlive: these can be killed all at once.
    """

    def __init__(self, size: int, log: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._late = time.monotonic() + PATIENCE
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with log.open("ab") as output:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, *words], stdout=output, stderr=output,
                    env=os.environ | world | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(size)
            ]  # fmt: skip

    def running(self) -> bool:
        """Whether none has ended, and it has not taken too long."""
        late = time.monotonic() > self._late
        return not late and all(process.poll() is None for process in self._processes)

    def wait(self) -> int:
        """The highest exit code; what is left a while after the first end is killed."""
        while self.running():
            time.sleep(0.05)
        until = time.monotonic() + 60
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.kill()
        return max(abs(process.returncode) for process in self._processes)

    def kill(self) -> None:
        """All of them, at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def curve(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def last_line(log: Path) -> str:
    """What was said last."""
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]


def measure_bandwidth() -> None:
    """On every rank: the rate of an all-reduce, from the best of five."""
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
        float(data[0])  # the device has finished
        seconds.append(time.perf_counter() - start)
        data.fill_(1)
    size = dist.get_world_size()
    rate = data.numel() * 4 / min(seconds[1:]) / 1e9
    if dist.get_rank() == 0:
        print(f"{rate:.3g} GB/s, {rate * 2 * (size - 1) / size:.3g} GB/s a link ({device.type})")
    dist.destroy_process_group()


def machine() -> str:
    """What the table is about."""
    import torch

    count = torch.cuda.device_count()
    device = (
        f"{count} x {torch.cuda.get_device_name(0)}" if count else f"{os.cpu_count()} CPU cores"
    )
    cuda = f", CUDA {torch.version.cuda}" if count else ""
    return f"{device}, torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def main() -> int:
    """Run all parts; 1 where one is not as it must be."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--processes", type=int, default=torch.cuda.device_count() or 2, metavar="N",
        help="how many to train with (default: one a GPU, or 2)")  # fmt: skip
    add("--golden", type=Path, metavar="FOLDER", help="golden files, *.npz")
    add("--precision", choices=sorted(BOUNDS), default="bf16" if torch.cuda.is_available() else
        "fp32", help="what to train in (default: bf16 on GPUs, fp32 on CPUs)")  # fmt: skip
    add("--bandwidth", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bandwidth:
        measure_bandwidth()
        return 0
    os.environ["PYTHONPATH"] = str(ROOT)  # for all that is started here
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hg-selftest-") as folder:
        test = SelfTest(Path(folder), options.processes, options.precision, device)
        test.prepare()
        rows: list[Row] = []

        def done(row: Row) -> None:
            rows.append(row)
            print(f"{'ok' if row.ok else 'FAILED':6}  {row.what}: {row.where}: {row.state}",
                  flush=True)  # fmt: skip

        for row in test.golden(options.golden):
            done(row)
        for row in test.same_curves():
            done(row)
        done(test.kill_and_resume())
        done(test.bandwidth())
    print(f"\n{machine()}\n\n| what | where | state |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row.what} | {row.where} | {row.state if row.ok else 'FAILED: ' + row.state} |")
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
