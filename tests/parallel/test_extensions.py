"""A process that was killed while it compiled holds up nobody."""

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


def test_the_lock_of_a_dead_process_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / "lock").touch()
    there = []
    monkeypatch.setattr(
        extensions, "build_shm_op", lambda: there.append((folder / "lock").exists())
    )
    load_extensions()
    assert there == [False]


def test_that_of_a_living_one_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building, go_on, seen = threading.Event(), threading.Event(), []

    def build() -> None:
        if building.is_set():
            seen.append("second")
            return
        (folder / "lock").touch()  # as torch does
        building.set()
        go_on.wait(10)
        seen.append((folder / "lock").exists())

    monkeypatch.setattr(extensions, "build_shm_op", build)
    threads = [threading.Thread(target=load_extensions) for _ in range(2)]
    threads[0].start()
    assert building.wait(10)
    threads[1].start()
    threads[1].join(0.3)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert seen == [True, "second"]


def test_another_program_at_work_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without our lock, as any that uses DeepSpeed: it would fail when it removes its file."""
    folder.mkdir()
    lock, there = folder / "lock", []
    hold = "import sys; file = open(sys.argv[1], 'w'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(lock)]
    monkeypatch.setattr(extensions, "build_shm_op", lambda: there.append(lock.exists()))
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        thread = threading.Thread(target=load_extensions)
        thread.start()
        thread.join(0.5)
        assert lock.exists() and not there
        other.kill()
    thread.join(10)
    assert there == [False]


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    called = []
    monkeypatch.setattr(extensions, "build_shm_op", lambda: called.append(True))
    load_extensions()
    assert called == [True]


def test_the_ninja_of_this_python_builds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts with one `PATH` and another must not build everything again in turn."""
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


def test_whether_it_is_compiled_yet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not extensions.is_compiled()
    (folder / "deepspeed_shm_comm.so").touch()
    assert extensions.is_compiled()
