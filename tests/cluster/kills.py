"""Kill random ranks of a run repeatedly: `python -m tests.cluster.kills --kills 50`."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.find import find_latest
from tests.forks import KILLED, Forks, die_at, finish
from tests.runs import TINY, curve, run_train
from tests.shared import ROOT

EVERY = 4  # steps between saves
STEPS_PER_START = 12  # at most, from a start to its kill
MODULES = ("deepspeed", "hg_scale.training.run", "hg_scale.training.engine", "tests.runs")


def train_or_die(arguments: list[str], output: Path, victim: int, moment: int) -> None:
    """Run `train.py` on this rank; the victim dies at file operation `moment` of saves, if any.

    Those are the operations inside the temporary folder of a save, so each falls into a save that
    has begun and not ended.
    """
    if moment and int(os.environ["RANK"]) == victim:
        die_at(moment, ".tmp/", removals=False)
    try:
        code = run_train(arguments, output)
    except RuntimeError:  # of gloo, as the victim is gone; the log has the traceback
        code = 3
    raise SystemExit(code)


def last_step(run: Path) -> int:
    """Return the last step that a run logged."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def resume_step(output: Path) -> int | None:
    """Return the step a start resumed from, 0 from scratch; None if it died before a step."""
    path = output.with_name(f"{output.name}-0")
    lines = path.read_text().splitlines() if path.exists() else []
    if not any(line.startswith("step ") for line in lines):
        return None
    return next((int(s.split()[3]) for s in lines if s.startswith("resumed at step")), 0)


class Victim:
    """A run on `size` ranks in `folder` whose ranks can be killed."""

    def __init__(self, forks: Forks, folder: Path, config: Path, size: int, steps: int) -> None:
        self.forks, self.folder, self.size, self.steps = forks, folder, size, steps
        self.run, self.starts = folder / "run", 0
        sets = (
            f"training.steps={steps}",
            f"checkpoint.every={EVERY}",
            "checkpoint.keep_last=2",
            "training.validate_every=0",
        )
        options = [word for key in sets for word in ("--set", key)]
        self.arguments = ["--config", str(config), "--run", str(self.run), *options]

    def start(self, victim: int = -1, moment: int = 0) -> tuple[list[Any], Path]:
        """Start the ranks; return their processes and the path of their output."""
        self.starts += 1
        output = self.folder / f"start-{self.starts}"
        return self.forks.start(
            self.size, train_or_die, self.arguments, output, victim, moment
        ), output

    def kill_once(self, draw: random.Random, during_save: bool) -> str:
        """Start, kill a random rank, and wait for the others to end. Returns a description.

        Raises AssertionError if the previous start lost more than the checkpoint in progress.
        """
        reached = last_step(self.run)
        latest = find_latest(self.run / "checkpoints")
        newest = int(latest.name.removeprefix("step-")) if latest else 0
        victim = draw.randrange(self.size)
        # In a save every rank writes its file; rank 0 also writes, renames and tidies the manifest.
        moment = draw.randint(1, 3 * (4 if victim == 0 else 1)) if during_save else 0
        processes, output = self.start(victim, moment)
        target = reached + draw.randint(0, STEPS_PER_START)
        delay = draw.random() * 0.05
        end = time.monotonic() + 120
        while not any(p.exitcode is not None for p in processes) and time.monotonic() < end:
            if (
                not during_save
                and resume_step(output) is not None
                and last_step(self.run) >= target
            ):
                time.sleep(delay)
                os.kill(processes[victim].pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        codes = finish(processes)
        assert codes[victim] == KILLED, (codes, output)
        resumed = resume_step(output)
        if resumed is not None:
            assert resumed == newest, (resumed, newest, output)
            # The checkpoint that was being written is lost. A save waits for the one before it, but
            # only once its own step is done: after step 28, that of step 24 may be unfinished.
            assert resumed >= (reached - 1) // EVERY * EVERY - EVERY, (resumed, reached, output)
        how = f"at operation {moment} of its saves" if moment else f"after step {target}"
        return f"rank {victim} killed {how}: resumed at {resumed}, logged to {last_step(self.run)}"

    def finish(self) -> None:
        """Run to the last step without a kill."""
        processes, output = self.start()
        assert finish(processes, 240 + self.steps / 2) == [0] * self.size, output


def kill_repeatedly(
    folder: Path, config: Path, kills: int, size: int, seed: int, report: Callable[[str], None]
) -> None:
    """Kill a run's ranks `kills` times, every second time during a save; then let it finish.

    Raises AssertionError if its curve differs in any bit from that of an uninterrupted run.
    """
    draw, forks = random.Random(seed), Forks(*MODULES)
    steps = (kills + 1) * 3 * STEPS_PER_START  # so that no killed start reaches the end
    victim = Victim(forks, folder / "killed", config, size, steps)
    uninterrupted = Victim(forks, folder / "uninterrupted", config, size, steps)
    for each in (victim, uninterrupted):
        each.folder.mkdir()
    for number in range(kills):
        report(f"{number + 1}: {victim.kill_once(draw, during_save=number % 2 == 1)}")
    victim.finish()
    uninterrupted.finish()
    found, expected = curve(victim.run), curve(uninterrupted.run)
    assert len(found) == steps and found == expected
    report(f"{kills // 2} of {kills} kills fell into a save that had begun and not ended")
    report(f"the curve of all {steps} steps equals that of the uninterrupted run, bit for bit")


def prepare(folder: Path) -> Path:
    """Write a small corpus and a configuration that trains on it; return its path."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    shards = folder / "shards"
    script = ROOT / "data_prep" / "prepare_bytes.py"
    command = [sys.executable, str(script), "--input", str(text), "--output", str(shards)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY, "data": {"path": str(shards)}}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kill_repeatedly(
            folder, prepare(folder), options.kills, options.processes, options.seed, print
        )


if __name__ == "__main__":
    main()
