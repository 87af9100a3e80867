"""The lock of a run folder: two runs in one folder would remove each other's checkpoints."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hg_scale.errors import UserError
from hg_scale.folder_lock import FolderLock

_PERIOD = 3.0  # seconds between two updates of the count
_ADVICE = "is training there; end it, or choose another --run"


class RunFolderLocked(UserError):
    """Another run has the folder, so this run must not write to it."""


class RunLock(FolderLock):
    """The exclusive right to write to a run folder, held by rank 0; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises Taken, naming the other run, or UserError: cannot be written."""
        super().__init__(folder, str(folder), _ADVICE, error=RunFolderLocked, period=_PERIOD)
        try:
            self.acquire()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from None

    def require(self) -> None:
        """Raise Taken where a run on another host has taken over."""
        with suppress(OSError):  # a full disk is no other run
            super().require()


def describe_living_run(folder: Path) -> str | None:
    """Describe the run that is training in `folder`, or return None. Changes nothing there.

    Takes as long as a living run needs to update its count, and 7 s where a killed one left it.
    """

    def read() -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            owner = json.loads((folder / "owner.json").read_text())
            return owner if isinstance(owner, dict) else None
        return None

    first, until = read(), time.monotonic() + 2 * _PERIOD + 1
    while first and time.monotonic() < until:
        owner = read()
        if owner is None:
            return None
        if owner != first:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
            return f"{folder}: {who}, {_ADVICE}"
        time.sleep(0.2)
    return None
