"""Runs of `hg_scale/train.py`: as a command, or in the processes of `tests.world`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.shared import ROOT
from tests.world import Worlds

TINY: dict[str, Any] = {
    "model": {
        "hierarchy": "1@1 1@2 1@1",
        "d_model": 32,
        "heads": 2,
        "d_ff": 64,
        "vocab_size": 257,
        "sequence_length": 32,
        "pooling": "average",
        "upsampling": "repeat",
    },
    "training": {"steps": 6, "global_batch_size": 4, "precision": "fp32", "validation_windows": 8},
    "logging": {"every": 1},
}
"""A configuration that trains in a second; it lacks `data.path`."""


def train(
    *arguments: str, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command, under a launcher or plain."""
    command = [*(launcher or (sys.executable,)), str(ROOT / "hg_scale" / "train.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


@dataclass(frozen=True)
class Finished:
    """Result of a run: the exit code of rank 0, and stdout and stderr of all ranks."""

    code: int
    output: str


def train_in(worlds: Worlds, size: int, folder: Path, *arguments: str) -> Finished:
    """Run `train.py` on `size` ranks without starting processes; `folder` keeps their output."""
    number = len(list(folder.glob("terminal-*")))
    prefix = folder / f"terminal-{number:03}"
    code = worlds.run(size, run_train, list(arguments), prefix)[0]
    output = "".join(p.read_text() for p in sorted(folder.glob(f"{prefix.name}-*")))
    return Finished(code, output)


def run_train(arguments: list[str], prefix: Path) -> int:
    """Run `train.py` on this rank, with file descriptors 1 and 2 redirected to PREFIX-RANK."""
    from hg_scale.train import add_options, run

    parser = argparse.ArgumentParser()
    add_options(parser)
    saved = os.dup(1), os.dup(2)
    with open(f"{prefix}-{os.environ['RANK']}", "wb", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            return run(parser.parse_args(arguments))
        finally:
            for descriptor, original in enumerate(saved, start=1):
                os.dup2(original, descriptor)
                os.close(original)


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of every logged step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run) if "loss" in r]


def arguments(config: Path, run: Path, *sets: str) -> list[str]:
    """Return the arguments of `train.py` that train into `run`, with overrides `key=value`."""
    overrides = [word for key in sets for word in ("--set", key)]
    return ["--config", str(config), "--run", str(run), *overrides]
