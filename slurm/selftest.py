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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

STEPS, KILL_AFTER = 20, 8
MODEL: dict[str, Any] = {
    "hierarchy": "2@1 4@2 2@1",
    "d_model": 256,
    "heads": 8,
    "d_ff": 1024,
    "vocab_size": 257,
    "sequence_length": 512,
}
BOUNDS = {"bf16": 1e-2, "fp32": 1e-4}  # relative, as in tests/training/test_layouts.py
MEGABYTES = 256


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

    def __init__(self, folder: Path, processes: int, precision: str) -> None:
        self.folder, self.processes, self.precision = folder, processes, precision
        self.config = folder / "selftest.json"
        self.reference: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """This package's own sources as a corpus, and a configuration."""
        corpus = self.folder / "corpus"
        script = str(ROOT / "data_prep" / "prepare_bytes.py")
        words = ["--input", str(ROOT / "hg_scale"), "--include", "*.py", "--output", str(corpus)]
        subprocess.run([sys.executable, script, *words], check=True, timeout=300)
        tree = {
            "model": MODEL,
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
            code = self.start(run, layout).wait(timeout=600)
            if code:
                yield Row("training", str(layout), f"exit code {code}: {tail(run)}", False)
                continue
            records = curve(run)
            self.reference = self.reference or records
            rate = sorted(r["tokens_per_second"] for r in records[5:])[len(records[5:]) // 2]
            yield self.compare("same curve", str(layout), records, f", {rate:,.0f} tokens/s")

    def kill_and_resume(self) -> Row:
        """A run that loses all its processes at once, and goes on in another layout."""
        run, kinds = self.folder / "killed", layouts(self.processes)
        process = self.start(run, kinds[0])
        until = time.monotonic() + 300
        while len(curve(run)) < KILL_AFTER and process.poll() is None:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached = len(curve(run))
        code = self.start(run, kinds[-1]).wait(timeout=600)
        where = f"{kinds[0]} -> {kinds[-1]}"
        if code:
            return Row("killed, resumed", where, f"exit code {code}: {tail(run)}", False)
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
        words = launcher(self.processes, __file__, "--bandwidth")
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        what = f"all-reduce of {MEGABYTES} MiB"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            return Row(what, f"{self.processes} processes", last, False)
        return Row(what, f"{self.processes} processes", done.stdout.strip(), True)

    def start(self, run: Path, layout: Layout) -> subprocess.Popen[bytes]:
        """Train in a process group of its own."""
        sets = {
            "parallel.tensor": layout.tensor,
            "parallel.pipeline": layout.pipeline,
            "parallel.zero_stage": layout.zero_stage,
        }
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        script = str(ROOT / "hg_scale" / "train.py")
        command = launcher(
            self.processes, script, "--config", str(self.config), "--run", str(run), *words
        )
        run.mkdir(exist_ok=True)
        with (run / "terminal.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def launcher(processes: int, *words: str) -> list[str]:
    """The command that starts `words` so many times on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(processes), "--", *words]


def curve(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def tail(run: Path) -> str:
    """The last line that a run said."""
    return (run / "terminal.log").read_text(errors="replace").strip().splitlines()[-1]


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
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The step that started this is one process; the ranks below are torchrun's.
    with tempfile.TemporaryDirectory(prefix="hg-selftest-") as folder:
        test = SelfTest(Path(folder), options.processes, options.precision)
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
