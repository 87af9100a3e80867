"""A process that was killed while it compiled blocks no later start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from hg_scale.parallel import extensions
from hg_scale.parallel.extensions import load_extensions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "deepspeed_shm_comm"


def test_lock_of_a_dead_process_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "lock").touch()
    locked = []
    monkeypatch.setattr(
        extensions, "build_shm_op", lambda: locked.append((folder / "lock").exists())
    )
    load_extensions()
    assert locked == [False]


def test_lock_of_a_running_process_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building, finish, seen = threading.Event(), threading.Event(), []

    def build() -> None:
        if building.is_set():
            seen.append("second")
            return
        (folder / "lock").touch()  # as torch does
        building.set()
        finish.wait(10)
        seen.append((folder / "lock").exists())

    monkeypatch.setattr(extensions, "build_shm_op", build)
    threads = [threading.Thread(target=load_extensions) for _ in range(2)]
    threads[0].start()
    assert building.wait(10)
    threads[1].start()
    threads[1].join(0.3)
    finish.set()
    for thread in threads:
        thread.join(10)
    assert seen == [True, "second"]


def test_another_program_that_compiles_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other program with DeepSpeed: without its lock file it would fail when it removes it."""
    folder.mkdir()
    lock, locked = folder / "lock", []
    hold = "import sys; file = open(sys.argv[1], 'w'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(lock)]
    monkeypatch.setattr(extensions, "build_shm_op", lambda: locked.append(lock.exists()))
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        thread = threading.Thread(target=load_extensions)
        thread.start()
        thread.join(0.5)
        assert lock.exists() and not locked
        other.kill()
    thread.join(10)
    assert locked == [False]


def test_an_unwritable_folder_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    called = []
    monkeypatch.setattr(extensions, "build_shm_op", lambda: called.append(True))
    load_extensions()
    assert called == [True]


def test_ninja_of_this_python_comes_first_on_the_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts with different PATHs must not compile everything again in turn."""
    other = folder.parent / "bin"
    other.mkdir()
    (other / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (other / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    found = []
    monkeypatch.setattr(extensions, "build_shm_op", lambda: found.append(shutil.which("ninja")))
    load_extensions()
    load_extensions()
    assert found == [f"{sysconfig.get_path('scripts')}/ninja"] * 2
    assert os.environ["PATH"].count(sysconfig.get_path("scripts")) == 1


def test_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not extensions.is_compiled()
    (folder / "deepspeed_shm_comm.so").touch()
    assert extensions.is_compiled()
