"""Give a folder one writer at a time, also across hosts.

The writer holds a kernel lock (`flock`) on `FOLDER/lock`, which ends with its process, so a killed
owner blocks nobody. Not every shared file system carries that lock between hosts, so the owner
also writes `FOLDER/owner.json` and increments a count in it: an owner on another host whose count
still grows is alive, whatever the kernel says.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from typing_extensions import TypedDict  # that of typing lacks what pydantic needs before 3.12

from hg_scale.atomic_write import write_json
from hg_scale.bounded_read import RECORD_BYTES, Count, FormatError, read_json, validated
from hg_scale.errors import UserError

BEAT = 1.0  # seconds between two updates of the count
_OWNER = "owner.json"
_WATCH = 15.0  # seconds in which the count of an owner on another host has to grow


class FolderOwner(TypedDict):
    """The content of owner.json."""

    host: str
    kernel: str
    pid: Count
    nonce: str
    since: str
    beat: Count


def read_folder_owner(folder: Path) -> FolderOwner | None:
    """Return the owner of a folder, or None where none is recorded legibly. Raises OSError."""
    with suppress(FileNotFoundError, FormatError):
        return validated(FolderOwner, read_json(folder / _OWNER, RECORD_BYTES))
    return None


class PeriodicThread:
    """A daemon thread that calls `work` every `period` seconds until it is stopped."""

    def __init__(self, work: Callable[[], None], period: float, name: str) -> None:
        self._work, self._period = work, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the current call and end the thread. May be called more than once."""
        self._stop.set()
        if self.started:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._work()


class FolderLock:
    """The exclusive right to write to a folder, kept alive by a thread; a context manager."""

    def __init__(
        self,
        folder: Path,
        what: str,
        advice: str,
        error: type[UserError] = UserError,
        period: float = BEAT,
    ) -> None:
        """Prepare the lock of an existing `folder` without taking it.

        Where another process has it, `error` is raised with the message "WHAT: process 12 on HOST,
        since ..., ADVICE". The count grows every `period` seconds.
        """
        self._lock, self._owner = folder / "lock", folder / _OWNER
        self._what, self._advice, self._error = what, advice, error
        self._record: FolderOwner = {
            "host": socket.gethostname(), "kernel": _kernel_id(), "pid": os.getpid(),
            "nonce": secrets.token_hex(8), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "beat": 0,
        }  # fmt: skip
        self._file: int | None = None
        self._updating = threading.Lock()
        self._thread = PeriodicThread(self._keep_alive, period, "folder lock")

    def acquire(self) -> None:
        """Take the lock and start the thread. Raises `error` where another process has it."""
        file = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise self._taken_by(self._read()) from None
        except OSError:
            pass  # a file system without locks: the count alone decides
        self._file = file
        try:
            owner = self._read()
            other_host = owner is not None and owner["kernel"] != self._record["kernel"]
            if owner and other_host and self._is_alive(owner):
                raise self._taken_by(owner)
            self._update()
            if other_host:
                time.sleep(2 * BEAT)  # another host may have done the same at the same moment
                self.require()
        except BaseException:
            self._close()
            raise
        self._thread.start()

    def require(self) -> None:
        """Raise `error` where another process has taken over; else update the count.

        A process on another host takes over where this one has not counted for 15 s.
        """
        with self._updating:
            owner = self._read()
            if owner and owner["nonce"] != self._record["nonce"]:
                raise self._taken_by(owner)
            self._update()

    def release(self) -> None:
        """Stop the thread and give up the lock. May be called more than once."""
        self._thread.stop()
        if self._file is None:
            return
        with suppress(OSError):
            owner = self._read()
            if owner and owner["nonce"] == self._record["nonce"]:
                self._owner.unlink(missing_ok=True)
        self._close()

    def __enter__(self) -> Self:
        if self._file is None:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep_alive(self) -> None:
        with suppress(OSError, self._error):  # `require` raises them when it matters
            self.require()

    def _update(self) -> None:
        self._record["beat"] += 1
        write_json(self._owner, self._record)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_alive(self, owner: FolderOwner) -> bool:
        """Return whether the count of an owner on another host still grows."""
        until = time.monotonic() + _WATCH
        while time.monotonic() < until:
            time.sleep(BEAT / 2)
            now = self._read()
            if now is None:
                return False  # it has just released the lock
            if now != owner:
                return True
        return False

    def _read(self) -> FolderOwner | None:
        return read_folder_owner(self._owner.parent)

    def _taken_by(self, owner: FolderOwner | None) -> UserError:
        who = (
            f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
            if owner
            else "another process"
        )
        return self._error(f"{self._what}: {who}, {self._advice}")


def _kernel_id() -> str:
    """Return what differs between two hosts even if they have the same name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
