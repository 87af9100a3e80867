"""Measure what a checkpoint costs training, and how fast it is written and read.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [save] [load] [--width 512] [--rounds 5]

Results are ratios of medians of alternating measurements, so they are robust to drift in the
machine's speed.

save: one process, fp32, ZeRO 1. Alternates undisturbed steps; a synchronous save; a plain write of
    as many bytes from memory with fsync (each into new files, after those of the last round were
    removed); an asynchronous save with the steps until it is written. Its cost is the stall of the
    loop plus the time by which these steps are slower.
load: two processes. Loads a checkpoint of DP2 ZeRO 1 into the same layout and into TP2, with the
    file in the page cache (`--cold`: dropped before, as root).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LENGTH = 32  # of a sequence: short steps show best how much each is delayed
Options = argparse.Namespace
Report = Callable[[str], None]


def make_engine_of(width: int, tensor: int = 1) -> Any:
    """Return an engine of this world's ranks for a model of this width, and a batch for it."""
    from hg_scale.config.load import parse_config
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    tree = {
        "model": {"hierarchy": "2@1 4@2 2@1", "d_model": width, "d_ff": 4 * width, "heads": 8,
                  "sequence_length": LENGTH, "positions": "rotary"},
        "training": {"global_batch_size": 2, "precision": "fp32", "steps": 10_000},
        "parallel": {"tensor": tensor, "zero_stage": 1},
    }  # fmt: skip
    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    ids = torch.randint(
        0, 256, (engine.local_batch_size, LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )
    return engine, ids


class Steps:
    """Runs one training step per call and returns its seconds."""

    def __init__(self, engine: Any, ids: torch.Tensor) -> None:
        self.engine, self.ids, self.done = engine, ids, 0

    def __call__(self) -> float:
        self.done += 1
        return seconds(lambda: self.engine.train_step(self.ids, self.done, 1e-4))


def seconds(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def write_plainly(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(data), 16 << 20):
            file.write(data[begin : begin + (16 << 20)])
        os.fsync(file.fileno())


def benchmark_save(options: Options, folder: Path, report: Report) -> None:
    from hg_scale.checkpoint.find import checkpoints_in
    from hg_scale.training.checkpointer import Checkpointer
    from hg_scale.training.state import TrainingProgress, save_state

    engine, ids = make_engine_of(options.width)
    step = Steps(engine, ids)
    for _ in range(3):
        step()
    config = engine.config
    path = save_state(engine, folder / "first", TrainingProgress(0), config)
    size = sum(p.stat().st_size for p in path.iterdir())
    data = memoryview(bytearray(os.urandom(1 << 20) * (size >> 20)))
    report(f"{size / 1e6:,.0f} MB a checkpoint, {os.cpu_count()} cores")
    undisturbed, synchronous, plain, costs, stalls, slower = [], [], [], [], [], []
    with Checkpointer(engine, folder, config, last_step=0, warn=print) as saver:
        saver.save(TrainingProgress(0))  # allocates the host memory
        for number in range(1, options.rounds + 1):
            saver.wait()
            usual_steps = [step() for _ in range(8)]
            shutil.rmtree(folder / "sync", ignore_errors=True)
            synchronous.append(
                seconds(
                    lambda n=number: save_state(
                        engine, folder / "sync", TrainingProgress(n), config
                    )
                )
            )
            (folder / "plain").unlink(missing_ok=True)
            plain.append(seconds(lambda: write_plainly(folder / "plain", data)))
            for older in checkpoints_in(folder).values():
                shutil.rmtree(older)
            usual_steps += [step() for _ in range(8)]
            usual = median(usual_steps)
            stall = seconds(lambda n=number: saver.save(TrainingProgress(n)))
            after = []
            while saver.busy:
                after.append(step())
            stalls.append(stall)
            undisturbed.append(usual)
            costs.append(stall + sum(after) - usual * len(after))
            slower.append(sum(after) / len(after) / usual if after else 1.0)
    stall, cost, sync = median(stalls), median(costs), median(synchronous)
    report(f"undisturbed step {median(undisturbed):.3f} s; synchronous save {sync:.2f} s "
           f"({size / sync / 1e6:,.0f} MB/s), plain write {median(plain):.2f} s")  # fmt: skip
    report(f"asynchronous save: stall {stall:.3f} s = {stall / sync:.1%} of a synchronous save; "
           f"the steps until it is written take {median(slower):.2f} times as long; with these "
           f"{cost / sync:.1%} (goal: at most 12%)")  # fmt: skip
    report(f"save rate against a plain write: {median(plain) / sync:.2f} (goal: at least 0.7)")


def benchmark_load(options: Options, folder: Path, report: Report) -> None:
    from hg_scale.training.state import TrainingProgress, load_state, save_state

    times: dict[int, list[float]] = {1: [], 2: []}
    path = None
    for tensor in times:
        engine, ids = make_engine_of(options.width, tensor)
        Steps(engine, ids)()
        if path is None:
            path = save_state(engine, folder, TrainingProgress(1), engine.config)
        load_state(engine, path)  # allocates the optimizer's state, reads the file's pages
        for _ in range(options.rounds):
            if options.cold and dist.get_rank() == 0:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            dist.barrier()
            local = torch.tensor(seconds(lambda e=engine, p=path: load_state(e, p)))
            dist.all_reduce(local, op=dist.ReduceOp.MAX)
            times[tensor].append(float(local))
    same, other = (median(t) for t in times.values())
    report(f"load into the same layout {same:.3f} s, into another {other:.3f} s: "
           f"{other / same:.2f} times (goal: at most 1.5)")  # fmt: skip


PARTS: dict[str, tuple[int, Callable[[Options, Path, Report], None]]] = {
    "save": (1, benchmark_save),
    "load": (2, benchmark_load),
}
"""By name: the number of processes, and the function of each; rank 0's reports are printed."""


def run_rank(rank: int, size: int, part: str, options: Options, folder: str) -> None:
    """Run a part of the benchmark on one rank."""
    from contextlib import redirect_stdout

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    lines: list[str] = []
    with open(os.devnull, "w") as null, redirect_stdout(null):  # DeepSpeed prints a lot
        PARTS[part][1](options, Path(folder), lines.append)
    if rank == 0:
        print("\n".join(f"{part}: {line}" for line in lines), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--width", type=int, default=512, help="of the model; 512: 25M parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: .)")
    parser.add_argument("--cold", action="store_true", help="load: drop the page cache first")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for part in options.parts or PARTS:
        size = PARTS[part][0]
        with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as folder:
            mp.spawn(run_rank, (size, part, options, folder), nprocs=size)


if __name__ == "__main__":
    main()
