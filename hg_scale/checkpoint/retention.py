"""Retention: which older checkpoints are removed after a save."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hg_scale.atomic_write import PARTIAL
from hg_scale.checkpoint.find import checkpoints_in, verify_sizes


@dataclass(frozen=True)
class RetentionPolicy:
    """Keep the `last` newest complete checkpoints (0: all) and multiples of `every` steps."""

    last: int = 0
    every: int = 0


def steps_to_remove(
    complete: Sequence[int], corrupt: Sequence[int], policy: RetentionPolicy
) -> list[int]:
    """Return the steps whose checkpoints are no longer kept, in order.

    Corrupt checkpoints do not count among the `last`; they are removed once `last` complete ones
    are newer.
    """
    if not policy.last or not complete:
        return []
    newest = sorted(complete)[-policy.last :]
    return [
        step
        for step in sorted({*complete, *corrupt})
        if step < newest[0] and not (policy.every and step % policy.every == 0)
    ]


def prune(
    folder: Path, step: int, policy: RetentionPolicy, corrupt: Collection[Path] = ()
) -> list[str]:
    """Remove the checkpoints that are no longer kept, given that `step` has just been saved.

    Later steps are left alone: they belong to a branch that the run has abandoned. `corrupt` are
    checkpoints that failed `verify_checksums`. Returns one line per checkpoint that could not be
    removed.
    """
    if not policy.last:
        return []
    try:
        checkpoints = {s: path for s, path in checkpoints_in(folder).items() if s <= step}
    except OSError as error:
        return [f"{folder} cannot be listed, so old checkpoints stay: {error.strerror}"]
    bad = [s for s, path in checkpoints.items() if path in corrupt or verify_sizes(path)]
    problems = []
    for old in steps_to_remove([s for s in checkpoints if s not in bad], bad, policy):
        try:
            remove_checkpoint(checkpoints[old])
        except OSError as error:
            problems.append(
                f"old checkpoint {checkpoints[old]} cannot be removed: {error.strerror}"
            )
    return problems


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so its name never holds a partial one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"latest.*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()
