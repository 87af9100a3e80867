"""The lock of a run folder: two runs in one folder would remove each other's checkpoints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hg_scale.errors import UserError
from hg_scale.folder_lock import FolderLock

_PERIOD = 3.0  # seconds between two updates of the count


class RunFolderLocked(UserError):
    """Another run has the folder, so this run must not write to it."""


class RunLock(FolderLock):
    """The exclusive right to write to a run folder, held by rank 0; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises Taken, naming the other run, or UserError: cannot be written."""
        advice = "is training there; end it, or choose another --run"
        super().__init__(folder, str(folder), advice, error=RunFolderLocked, period=_PERIOD)
        try:
            self.acquire()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from None

    def require(self) -> None:
        """Raise Taken where a run on another host has taken over."""
        with suppress(OSError):  # a full disk is no other run
            super().require()
