"""Overhead of the guard's check of loss and gradients per step.

    OMP_NUM_THREADS=1 python benchmarks/guard.py [--ranks 2] [--rounds 12]

Alternates, in one run, steps with and without the guard, for each ZeRO stage. The guard also
reduces the loss, which the steps without it reduce themselves. Prints the median of the ratios of
neighbouring steps, and the range of the middle 80%.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MODEL = {
    "hierarchy": "2@1 8@3 2@1", "d_model": 256, "heads": 8, "d_ff": 1024, "vocab_size": 256,
    "sequence_length": 510, "positions": "rotary", "pooling": "average", "upsampling": "repeat",
}  # fmt: skip
KINDS = ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"))


def measure(rank: int, options: argparse.Namespace, folder: str, stage: int, kind: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu"
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks
    )
    from hg_scale.config.load import parse_config
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    tree = {
        "model": MODEL,
        "training": {"global_batch_size": 2 * options.ranks, "precision": kind},
        "parallel": {"zero_stage": stage},
    }
    config = parse_config(tree, world_size=options.ranks)
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randint(256, (2, 511), generator=generator)
    guarded: Callable[..., Any] = engine.deepspeed._take_model_step
    unguarded = type(engine.deepspeed)._take_model_step.__get__(engine.deepspeed)

    def timed(step: int, guard: bool) -> float:
        engine.deepspeed._take_model_step = guarded if guard else unguarded
        dist.barrier()
        start = perf_counter()
        engine.train_step(batch, step, 1e-4)
        if not guard:
            loss = engine._mean_loss()
            dist.all_reduce(loss)
            float(loss)
        return perf_counter() - start

    for step in range(1, 4):
        timed(step, True)
    pairs = [(timed(4, True), timed(4, False)) for _ in range(options.rounds)]
    if rank == 0:
        ratios = np.array([a / b for a, b in pairs])
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        bare = np.median([b for _, b in pairs])
        print(
            f"ZeRO {stage} {kind}: {middle:.3f} x ({low:.3f} to {high:.3f}) {bare:.3f} s per step",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    for stage, kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (options, str(Path(folder)), stage, kind), options.ranks)


if __name__ == "__main__":
    main()
