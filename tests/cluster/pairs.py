"""Save in one layout and resume in another: `python -m tests.cluster.pairs` prints the full table.

python -m tests.cluster.pairs [--precision bf16] [--writers 0:4]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.training.resumable import Curve, Layout, Run, parse
from tests.world import Worlds

LAYOUTS = ("1 1 1", "2 1 1", "1 2 1", "1 1 2 zero1", "1 1 2 zero3", "2 2 1", "2 1 2 zero2", "2 2 2")
BEFORE, AFTER = 10, 10  # steps before and after the save
BOUND = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of losses and gradient norms


def uninterrupted(tree: dict[str, Any], folder: Path) -> tuple[Path, Curve]:
    """Train, save, and continue training; return the checkpoint and the curve after it."""
    run = Run(tree)
    run.train(1, BEFORE)
    path = run.save(folder, BEFORE)
    return path, run.train(BEFORE + 1, AFTER)


def resumed(tree: dict[str, Any], path: Path) -> Curve:
    """Return the curve of a new run that resumes from a checkpoint."""
    from hg_scale.training.state import load_state

    run = Run(tree)
    assert load_state(run.engine, path).step == BEFORE
    return run.train(BEFORE + 1, AFTER)


class Pairs:
    """Writes a checkpoint in each layout once, and resumes it in the others."""

    def __init__(self, worlds: Worlds, folder: Path) -> None:
        self._worlds, self._folder = worlds, folder
        self._written: dict[Layout, tuple[Path, Curve]] = {}

    def _written_by(self, layout: Layout) -> tuple[Path, Curve]:
        if layout not in self._written:
            folder = self._folder / str(layout)
            results = self._worlds.run(layout.world, uninterrupted, layout.tree(), folder)
            self._written[layout] = results[0]
        return self._written[layout]

    def deviation(self, writer: str, reader: str, precision: str) -> float:
        """Return the largest relative difference from one uninterrupted process; 0: bit-equal.

        In the same layout: from its own uninterrupted curve.
        """
        source, target, single = (
            parse(f"{text} {precision}") for text in (writer, reader, LAYOUTS[0])
        )
        path, own = self._written_by(source)
        curve = self._worlds.run(target.world, resumed, target.tree(), path)[0]
        expected = own if source == target else self._written_by(single)[1]
        return float(np.max(np.abs(np.divide(curve, expected) - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", default="fp32", choices=BOUND)
    parser.add_argument("--writers", default=":", metavar="A:B", help="which rows of the table")
    options = parser.parse_args()
    first, last = (int(word) if word else None for word in options.writers.split(":"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    worlds = Worlds()
    names = [str(parse(text)).rsplit("-", 2)[0] for text in LAYOUTS]
    print(f"{options.precision}, {BEFORE} steps, saved, {AFTER} steps in another layout: largest "
          "relative difference of loss and gradient norm\nfrom one uninterrupted process "
          "(same layout: from itself). Rows wrote, columns read.\n")  # fmt: skip
    print(" " * 16 + "".join(f"{name:>16}" for name in names))
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(worlds, Path(folder))
        for writer, name in list(zip(LAYOUTS, names, strict=True))[first:last]:
            print(f"{name:16}", end="")
            for reader in LAYOUTS:
                deviation = pairs.deviation(writer, reader, options.precision)
                if writer != reader:
                    worst = max(worst, deviation)
                cell = "bit-equal" if deviation == 0 else f"{deviation:.1e}"
                print(f"{cell:>16}", end="", flush=True)
            print()
    worlds.close()
    print(f"\nlargest of different layouts: {worst:.1e} (bound {BOUND[options.precision]:.0e})")
    sys.exit(worst > BOUND[options.precision])


if __name__ == "__main__":
    main()
