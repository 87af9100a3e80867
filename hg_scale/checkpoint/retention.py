"""Which checkpoints are kept. Only what was put in place whole and is not the newest may go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hg_scale.atomic_write import PARTIAL
from hg_scale.checkpoint.find import checkpoints_in, damage


@dataclass(frozen=True)
class Keep:
    """The `last` newest whole ones (0: all), and those whose step is a multiple of `every`."""

    last: int = 0
    every: int = 0


def superseded(whole: Sequence[int], damaged: Sequence[int], keep: Keep) -> list[int]:
    """The steps that may go.

    Damaged ones count for nothing, and go once `last` whole ones are newer.
    """
    if not keep.last or not whole:
        return []
    newest = sorted(whole)[-keep.last :]
    return [
        step
        for step in sorted({*whole, *damaged})
        if step < newest[0] and not (keep.every and step % keep.every == 0)
    ]


def prune(folder: Path, step: int, keep: Keep, damaged: Collection[Path] = ()) -> list[str]:
    """Remove what the whole checkpoint of `step` supersedes; what could not be removed, in words.

    Looks at no later step: those are of a course that the run has left. `damaged` are those known
    to be so beyond what names and sizes say.
    """
    if not keep.last:
        return []
    try:
        there = {s: path for s, path in checkpoints_in(folder).items() if s <= step}
    except OSError as error:
        return [f"{folder} cannot be listed, and keeps what is superseded: {error.strerror}"]
    bad = [s for s, path in there.items() if path in damaged or damage(path)]
    faults = []
    for old in superseded([s for s in there if s not in bad], bad, keep):
        try:
            remove(there[old])
        except OSError as error:
            faults.append(f"{there[old]} is superseded and cannot be removed: {error.strerror}")
    return faults


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. Under its name it is there whole or not at all."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals left that were cut short."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"latest.*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()
