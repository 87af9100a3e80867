"""A folder has one writer at a time; the lock of an owner that was killed can be taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hg_scale import folder_lock
from hg_scale.errors import UserError
from hg_scale.folder_lock import FolderLock, PeriodicThread

OWNER = {"host": "n7", "kernel": "other", "pid": 1, "nonce": "n", "since": "noon", "beat": 0}


def make_lock(folder: Path) -> FolderLock:
    return FolderLock(folder, "here", "is writing")


class Occupied(UserError):
    pass


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first, second = make_lock(tmp_path), make_lock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=rf"^here: process {os.getpid()} on .*, is writing$"):
        second.acquire()
    first.release()
    assert not (tmp_path / "owner.json").exists()
    second.acquire()
    second.release()
    second.release()


def test_the_chosen_error_is_raised(tmp_path: Path) -> None:
    with make_lock(tmp_path), pytest.raises(Occupied):
        FolderLock(tmp_path, "here", "is writing", error=Occupied).acquire()


def test_the_count_grows_by_itself(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "here", "is writing", period=0.05):
        until = time.monotonic() + 20
        while json.loads((tmp_path / "owner.json").read_text())["beat"] < 3:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_the_lock_of_a_killed_owner_is_taken_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from hg_scale.folder_lock import FolderLock;"
        f"FolderLock(Path({str(tmp_path)!r}), '', '').acquire(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert (tmp_path / "owner.json").exists()
    start = time.monotonic()
    with make_lock(tmp_path):
        assert time.monotonic() - start < 5  # without waiting for the count: the kernel knows


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(folder_lock, "_WATCH", 1.5)
    monkeypatch.setattr(folder_lock, "BEAT", 0.2)
    monkeypatch.setattr(folder_lock.fcntl, "flock", lambda *_: None)  # not seen by other hosts
    owner: dict[str, Any] = dict(OWNER)

    def count() -> None:
        owner["beat"] += 1
        (tmp_path / "partial").write_text(json.dumps(owner))
        (tmp_path / "partial").replace(tmp_path / "owner.json")

    (tmp_path / "owner.json").write_text(json.dumps(owner))
    thread, lock = PeriodicThread(count, 0.05, "owner"), make_lock(tmp_path)
    if alive:
        thread.start()
        try:
            with pytest.raises(UserError, match="process 1 on n7, since noon, is writing"):
                lock.acquire()
        finally:
            thread.stop()
        return
    lock.acquire()
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="process 1 on n7"):  # it has taken over
        lock.require()
    lock.release()
    assert json.loads((tmp_path / "owner.json").read_text()) == owner  # not ours to remove


def test_a_periodic_thread_ends_after_its_current_call() -> None:
    called = threading.Event()
    thread = PeriodicThread(called.set, 0.01, "test")
    assert not thread.started
    thread.start()
    assert thread.started and called.wait(20)
    thread.stop()
    called.clear()
    assert not called.wait(0.1)
    thread.stop()
