"""Overhead of heartbeat, watchdog and straggler table in a run of short steps.

    OMP_NUM_THREADS=1 python benchmarks/monitoring.py [--ranks 2] [--rounds 20]

Alternates, in one run, steps without monitoring, steps with it, and steps that are also logged,
which adds a collective to each. Prints medians and their ratios.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BLOCK = 20  # steps of one kind in a row


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu"
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks
    )
    from hg_scale.config.load import parse_config
    from hg_scale.parallel.launch import Launch
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.console import Console, quiet_libraries
    from hg_scale.training.engine import make_engine
    from hg_scale.training.monitoring.monitor import monitor_run

    tree = {
        "model": {"hierarchy": "1@1 1@2 1@1", "d_model": 32, "heads": 2, "d_ff": 64,
                  "sequence_length": 32},
        "training": {"global_batch_size": 4, "precision": "fp32", "steps": 100_000},
    }  # fmt: skip
    with quiet_libraries(Path(folder) / f"log-{rank}") as terminal:
        config = parse_config(tree, world_size=options.ranks)
        mesh, parts = make_mesh(config.parallel)
        device = torch.device("cpu")
        engine = make_engine(config, mesh, parts, device)
        ids = torch.randint(0, 256, (engine.local_batch_size, 33))
        console = Console(1, rank=rank, stream=terminal)
        launch = Launch(rank, options.ranks, rank)
        times: dict[str, list[float]] = {"bare": [], "monitored": [], "logged": []}
        number = 0

        def bare() -> None:
            engine.train_step(ids, number, 1e-4)

        for _ in range(10):
            bare()
        for _ in range(options.rounds):
            for kind in times:
                if kind == "bare":
                    for _ in range(BLOCK):
                        number += 1
                        start = perf_counter()
                        bare()
                        times[kind].append(perf_counter() - start)
                    continue
                with monitor_run(config, Path(folder), launch, console, device) as monitor:
                    monitor.attach(engine)
                    for _ in range(BLOCK):
                        number += 1
                        start = perf_counter()
                        monitor.enter("step", number)
                        with monitor.reading():
                            pass
                        bare()
                        if kind == "logged":
                            monitor.record()
                        times[kind].append(perf_counter() - start)
                    monitor.enter("end", number)
                engine.model._forward_pre_hooks.clear()
                engine.model._forward_hooks.clear()
        bare_time = median(times["bare"])
        with monitor_run(config, Path(folder), launch, console, device) as monitor:
            start = perf_counter()
            for number in range(10_000):
                monitor.enter("step", number)
                with monitor.reading():
                    pass
            calls = (perf_counter() - start) / 10_000
            heartbeat = monitor._heartbeat
            start = perf_counter()
            for _ in range(200):
                heartbeat.beat()
            beat = (perf_counter() - start) / 200
        if rank == 0:
            for kind, seconds in times.items():
                middle = median(seconds)
                console.print(
                    f"{kind:9} {1e3 * middle:.2f} ms per step, {middle / bare_time:.4f} x"
                )
            console.print(f"calls     {1e6 * calls:.1f} us per step, heartbeat {1e6 * beat:.0f} us")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (options, folder), options.ranks)
