"""One run at a time in a run folder: two would remove each other's checkpoints."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from hg_scale.data.errors import DataError
from hg_scale.data.lock import FolderLock
from hg_scale.errors import UserError

_PERIOD = 3.0  # seconds between two signs of life; another host waits for one for 15


class Taken(DataError):
    """Another run has the folder, and so nothing in it is this one's to write."""


class RunLock:
    """The right of this run to write to its folder, held by the first rank; a context manager.

    The folder gets a `lock` and, while a run has it, an `owner.json`. Of a killed run the kernel
    gives the lock back; one on another host is waited for until it shows no more sign of life.
    """

    def __init__(self, folder: Path) -> None:
        """Take it. Raises Taken, naming the run that has it, or UserError: why it cannot be."""
        self._lock = FolderLock(
            folder, what=f"{folder}", advice="is training there; end it, or choose another --run"
        )
        try:
            self._lock.acquire()
        except (OSError, DataError) as error:
            self._lock.release(remove=False)
            if isinstance(error, DataError):
                raise Taken(str(error)) from None
            raise UserError(f"{folder}: cannot be written: {error}") from None
        self._one_at_a_time = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise UserError where a run on another host has taken over, this one seeming dead."""
        with self._one_at_a_time, suppress(OSError):  # a full disk is no rival
            self._lock.beat()

    def _keep_beating(self) -> None:
        while not self._leave.wait(_PERIOD):
            with suppress(DataError):  # `require` says so when it matters
                self.require()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._thread.join()
        try:
            self.require()
        except DataError:
            self._lock.release(remove=False)
        else:
            with suppress(OSError):
                self._lock.release()
