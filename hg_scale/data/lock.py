"""One writer to a folder, on whatever machines its rivals run.

The kernel's lock (`flock`) ends with its process, so a killed owner never stands in the way. Not
every cluster's file system carries it from host to host, so the owner also writes who it is and
keeps counting: an owner on another host that still counts is alive, whatever the kernel says.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hg_scale.data.errors import DataError

BEAT = 1.0  # seconds between two signs of life
_WATCH = 15.0  # seconds that a foreign owner gets to show one
_ADVICE = (
    "is writing there; wait for it or end it. Were several processes started to work together? "
    "Then they do not know of each other: start them with mpirun (and mpi4py of the same MPI) or "
    "srun"
)


class FolderLock:
    """The right to write to a folder; `beat` has to be called about once a `BEAT`."""

    def __init__(self, folder: Path, what: str = "", advice: str = _ADVICE) -> None:
        """`folder` exists. Nothing is taken yet.

        `what` is to be written, and `advice` for whom another process has it.
        """
        self._lock, self._owner = folder / "lock", folder / "owner.json"
        self._what, self._advice = what or f"--output {folder.parent}", advice
        self._record: dict[str, Any] = {
            "host": socket.gethostname(), "kernel": _kernel(), "pid": os.getpid(),
            "nonce": secrets.token_hex(8), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "beat": 0,
        }  # fmt: skip
        self._file: int | None = None

    def acquire(self) -> None:
        """Take it. Raises DataError, naming the owner, where another process has it."""
        file = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise self._taken(self._read()) from None
        except OSError:
            pass  # a file system without locks: the count below decides alone
        self._file = file
        owner = self._read()
        elsewhere = owner is not None and owner["kernel"] != self._record["kernel"]
        if owner and elsewhere and self._still_counts(owner):
            self.release(remove=False)
            raise self._taken(owner)
        self.beat(first=True)
        if elsewhere:
            time.sleep(2 * BEAT)  # another host may have done the same at the same moment
            self.beat()

    def beat(self, first: bool = False) -> None:
        """Show a sign of life. Raises DataError where another process has taken over."""
        owner = None if first else self._read()
        if owner and owner["nonce"] != self._record["nonce"]:
            raise self._taken(owner)
        self._record["beat"] += 1
        partial = self._owner.with_suffix(f".{self._record['nonce']}")
        partial.write_text(json.dumps(self._record))
        partial.replace(self._owner)

    def release(self, remove: bool = True) -> None:
        """Give it up. May be called more than once."""
        if self._file is not None:
            if remove:
                self._owner.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _still_counts(self, owner: dict[str, Any]) -> bool:
        until = time.monotonic() + _WATCH
        while time.monotonic() < until:
            time.sleep(BEAT / 2)
            now = self._read()
            if now is None:
                return False  # it has just given it up
            if now != owner:
                return True
        return False

    def _read(self) -> dict[str, Any] | None:
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._owner.read_text())
        return None

    def _taken(self, owner: dict[str, Any] | None) -> DataError:
        who = (
            f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
            if owner
            else "another process"
        )
        return DataError(f"{self._what}: {who}, {self._advice}")


def _kernel() -> str:
    """What differs between two machines, whatever they are called."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
