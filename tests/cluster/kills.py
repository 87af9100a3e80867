"""A run whose ranks are killed, again and again: `python -m tests.cluster.kills --kills 50`."""

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
STEPS_A_LIFE = 12  # at most, from a start to its kill
MODULES = ("deepspeed", "hg_scale.training.run", "hg_scale.training.engine", "tests.runs")


def live(arguments: list[str], output: Path, victim: int, moment: int) -> None:
    """`train.py` on this rank; the victim dies at a moment of a save (0: not by itself)."""
    if moment and int(os.environ["RANK"]) == victim:
        die_at(moment, "checkpoints/.")
    try:
        code = run_train(arguments, output)
    except RuntimeError:  # gloo's: the victim is gone; the run's log has the traceback
        code = 3
    raise SystemExit(code)


def last_step(run: Path) -> int:
    """The last step that a run logged."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def began_at(output: Path) -> int | None:
    """The step that a run went on from (0: it began anew); None: it died before its first step."""
    path = output.with_name(f"{output.name}-0")
    lines = path.read_text().splitlines() if path.exists() else []
    if not any(line.startswith("step ") for line in lines):
        return None
    return next((int(s.split()[3]) for s in lines if s.startswith("resumed at step")), 0)


class Victim:
    """A run on `size` ranks, in `folder`, that dies as it is told to."""

    def __init__(self, forks: Forks, folder: Path, config: Path, size: int, steps: int) -> None:
        self.forks, self.folder, self.size, self.steps = forks, folder, size, steps
        self.run, self.lives = folder / "run", 0
        sets = (
            f"training.steps={steps}",
            f"checkpoint.every={EVERY}",
            "checkpoint.keep_last=2",
            "training.validate_every=0",
        )
        words = [word for key in sets for word in ("--set", key)]
        self.arguments = ["--config", str(config), "--run", str(self.run), *words]

    def start(self, victim: int = -1, moment: int = 0) -> tuple[list[Any], Path]:
        """Processes of the next life, and where its output goes."""
        self.lives += 1
        output = self.folder / f"life-{self.lives}"
        return self.forks.start(self.size, live, self.arguments, output, victim, moment), output

    def kill_once(self, draw: random.Random, during_save: bool) -> str:
        """Start, have a random rank killed, wait for the others to end. Returns what happened.

        Raises AssertionError where the start lost more than it may.
        """
        reached = last_step(self.run)
        whole = find_latest(self.run / "checkpoints")
        newest = int(whole.name.removeprefix("step-")) if whole else 0
        victim = draw.randrange(self.size)
        # The first rank does all that concerns the folder, the others write one file a save.
        moment = draw.randint(1, 24 if victim == 0 else 2) if during_save else 0
        processes, output = self.start(victim, moment)
        wanted = reached + draw.randint(0, STEPS_A_LIFE)
        delay = draw.random() * 0.05
        end = time.monotonic() + 120
        while not any(p.exitcode is not None for p in processes) and time.monotonic() < end:
            if not during_save and began_at(output) is not None and last_step(self.run) >= wanted:
                time.sleep(delay)
                os.kill(processes[victim].pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        codes = finish(processes)
        assert codes[victim] == KILLED, (codes, output)
        begun = began_at(output)
        if begun is not None:
            assert begun == newest, (begun, newest, output)
            # The newest is that of the last interval, or the one before where that was in flight.
            assert begun >= reached // EVERY * EVERY - EVERY, (begun, reached, output)
        how = f"at operation {moment} of its saves" if moment else f"after step {wanted}"
        return f"rank {victim} killed {how}: began at {begun}, logged to {last_step(self.run)}"

    def finish(self) -> None:
        """The last life, undisturbed, to the last step."""
        processes, output = self.start()
        assert finish(processes, 240 + self.steps / 2) == [0] * self.size, output


def kill_again_and_again(
    folder: Path, config: Path, kills: int, size: int, seed: int, tell: Callable[[str], None]
) -> None:
    """Kill a run's ranks `kills` times, every third time during a save; then let it end.

    Raises AssertionError where its curve is not, bit for bit, that of a run left alone.
    """
    draw, forks = random.Random(seed), Forks(*MODULES)
    steps = (kills + 1) * 3 * STEPS_A_LIFE  # so that no life comes to the end
    victim = Victim(forks, folder / "killed", config, size, steps)
    alone = Victim(forks, folder / "alone", config, size, steps)
    for each in (victim, alone):
        each.folder.mkdir()
    for number in range(kills):
        tell(f"{number + 1}: {victim.kill_once(draw, during_save=number % 3 == 2)}")
    victim.finish()
    alone.finish()
    found, expected = curve(victim.run), curve(alone.run)
    assert len(found) == steps and found == expected
    tell(f"the curve of all {steps} steps is that of the run left alone, bit for bit")


def prepare(folder: Path) -> Path:
    """A small corpus, and a configuration that trains on it."""
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
        kill_again_and_again(
            folder, prepare(folder), options.kills, options.processes, options.seed, print
        )


if __name__ == "__main__":
    main()
