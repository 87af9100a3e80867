"""A process that was killed while it compiled blocks no later start; installations are separate."""

from __future__ import annotations

import fcntl
import importlib
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hg_scale.parallel import extensions
from hg_scale.parallel.extensions import (
    ExtensionLocked,
    extension_folder,
    is_compiled,
    load_extensions,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this installation, in an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return extension_folder()


def replace_build(monkeypatch: pytest.MonkeyPatch, build: Callable[[], object]) -> None:
    """Replace what compiles and loads the extension."""
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", build)


def test_lock_of_a_dead_process_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    locked = []
    replace_build(monkeypatch, lambda: locked.append((folder / "lock").exists()))
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

    replace_build(monkeypatch, build)
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
    folder.mkdir(parents=True)
    lock, locked = folder / "lock", []
    hold = "import sys; file = open(sys.argv[1], 'w'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(lock)]
    replace_build(monkeypatch, lambda: locked.append(lock.exists()))
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
    replace_build(monkeypatch, lambda: called.append(True))
    load_extensions()
    assert called == [True]


def test_ninja_of_this_python_comes_first_on_the_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts with different PATHs must not compile everything again in turn."""
    other = folder.parents[1] / "bin"
    other.mkdir()
    (other / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (other / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    found = []
    monkeypatch.setattr(extensions.sys, "executable", "echo")  # of the wrapper's command
    replace_build(
        monkeypatch,
        lambda: found.append(subprocess.check_output(["ninja", "--version"], text=True)),
    )
    load_extensions()
    load_extensions()
    assert len(found) == 2 and found[0] == found[1]
    assert found[0].split()[-2:] == [f"{sysconfig.get_path('scripts')}/ninja", "--version"]
    assert os.environ["PATH"] == f"{other}:/usr/bin:/bin"


def test_ninja_and_its_compilers_end_with_a_killed_start(folder: Path, tmp_path: Path) -> None:
    compiler = "sleep 600"
    (tmp_path / "build.ninja").write_text(
        f"rule compile\n  command = echo $$$$ > pid; exec {compiler}\nbuild out: compile\n"
    )
    start = (
        "import subprocess, sys; from hg_scale.parallel import extensions; "
        "import importlib; torch = importlib.import_module('deepspeed.comm.torch'); "
        "torch.build_shm_op = lambda: subprocess.run(['ninja'], cwd=sys.argv[1]); "
        "extensions.load_extensions()"
    )
    pid_file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", start, str(tmp_path)]) as process:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
        compiler_pid = int(pid_file.read_text())
        assert Path(f"/proc/{compiler_pid}").exists()
        process.kill()
    wait_for(lambda: not Path(f"/proc/{compiler_pid}").exists())


def test_is_compiled_for_this_installation_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_compiled()
    folder.mkdir(parents=True)
    (folder / "deepspeed_shm_comm.so").touch()
    assert not is_compiled()  # by a start that was killed before it was complete
    (folder / ".ninja_log").write_text("0\t9\t1\tdeepspeed_shm_comm.so\tc0ffee\n")
    assert is_compiled()
    for module, name, value in (
        (extensions.importlib.metadata, "version", lambda _: "9.9"),
        (extensions.sys, "base_prefix", "/other"),
        (extensions.sysconfig, "get_path", lambda _: "/other/clone/.venv"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not is_compiled()


def test_a_wait_is_reported_at_once_and_has_a_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    lock = folder / "hg_scale.lock"
    lines: list[str] = []
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on n7\n")
        file.flush()
        with pytest.raises(ExtensionLocked) as raised:
            load_extensions(lines.append, limit=0.1)
    assert lines == [
        f"waiting for process 12 on n7, which compiles DeepSpeed's collectives ({lock})"
    ]
    assert str(raised.value).startswith(f"{lock}: still locked by process 12 on n7")
    assert f"delete {folder}" in str(raised.value)
    replace_build(monkeypatch, lambda: lines.append(lock.read_text()))
    load_extensions(lines.append)
    assert lines[1:] == [
        f"compiling DeepSpeed's collectives for CPUs, once: about a minute ({folder})",
        f"process {os.getpid()} on {socket.gethostname()}\n",
    ]


def wait_for(is_true: Callable[[], bool]) -> None:
    """Wait up to a minute."""
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)
