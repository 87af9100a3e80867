"""Compile and load DeepSpeed's extension for CPU collectives, without stale locks.

Each combination of Python, torch and DeepSpeed has a folder of its own under TORCH_EXTENSIONS_DIR:
two installations that share one would compile everything again in turn.

Torch protects the folder of a compiled extension by a file `lock`. A process that is killed while
it compiles leaves the file behind, and all later processes wait for it forever. An flock, which
the kernel releases with its process, therefore guards the folder first: its holder knows that no
process of hg_scale owns `lock`, and that no other program does if none has the file open.

The extension is built with the `ninja` of this Python, whatever PATH says: another version discards
the build log of the previous one. ninja and the compilers end with this process, even if it is
killed.

Imports torch and DeepSpeed only to compile or load.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hg_scale.errors import UserError

LIMIT = 900.0  # seconds to wait for another process that compiles
_POLL, _LOAD = 0.2, 5.0  # seconds
_NAME = "deepspeed_shm_comm"
# Runs a command that gets SIGTERM when its parent ends (PR_SET_PDEATHSIG). ninja then ends its
# compilers.
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == 1 or os.execv(sys.argv[1], sys.argv[1:])"
)


class ExtensionLocked(UserError):
    """Another process holds the lock of the extension's folder for longer than the limit."""


def extension_folder() -> Path:
    """Return the folder of the compiled extension for this Python, torch and DeepSpeed."""
    parts = [sys.version, sys.base_prefix, sysconfig.get_path("purelib")]
    for package in ("torch", "deepspeed"):
        spec = importlib.util.find_spec(package)
        parts += [importlib.metadata.version(package), str(spec and spec.origin)]
    name = f"hg_scale-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    return (root if root.name == name else root / name) / _NAME  # of a parent that builds


def is_compiled() -> bool:
    """Whether the extension is compiled; if not, the next start compiles for about a minute."""
    folder, library = extension_folder(), f"{_NAME}.so"
    try:  # ninja logs a file when it is complete
        return (folder / library).exists() and library in (folder / ".ninja_log").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def load_extensions(report: Callable[[str], None] | None = None, limit: float = LIMIT) -> None:
    """Compile or load the extension, one process of a node at a time, before DeepSpeed uses it.

    report: told at once that this process compiles, or for which process it waits. An error of the
    folder is left to torch to report. Raises ExtensionLocked after `limit` seconds of waiting.
    """
    # Before the lock: it takes seconds, in which no other process should have to wait.
    from deepspeed.comm.torch import build_shm_op

    report = report or (lambda _: None)
    folder = extension_folder()
    with _locked(folder, report, limit), _build_environment(folder):
        if not is_compiled():
            report(f"compiling DeepSpeed's collectives for CPUs, once: about a minute ({folder})")
        build_shm_op()


@contextmanager
def _locked(folder: Path, report: Callable[[str], None], limit: float) -> Iterator[None]:
    """Hold the folder's lock, whose file names its holder."""
    end = time.monotonic() + limit
    path, torch_lock = folder / "hg_scale.lock", folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError:
        yield
        return
    with file:
        _wait_until(lambda: _try_lock(file), path, report, end)
        _wait_until(lambda: not is_open_in_a_process(torch_lock), torch_lock, report, end)
        with suppress(OSError):  # a full disk
            torch_lock.unlink(missing_ok=True)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def _wait_until(
    is_free: Callable[[], bool], lock: Path, report: Callable[[str], None], end: float
) -> None:
    """Wait until the lock is free, or raise ExtensionLocked; report the wait once.

    It is reported at once if there is something to compile; a load takes a moment.
    """
    start, reported = time.monotonic(), False
    while not is_free():
        holder = _holder(lock)
        if time.monotonic() >= end:
            raise ExtensionLocked(
                f"{lock}: still locked by {holder}, which compiles DeepSpeed's collectives; end it "
                f"if it hangs, or delete {lock.parent}, and start again"
            )
        if not reported and (not is_compiled() or time.monotonic() > start + _LOAD):
            report(f"waiting for {holder}, which compiles DeepSpeed's collectives ({lock})")
            reported = True
        time.sleep(_POLL)


def _holder(lock: Path) -> str:
    """Describe the process that holds a lock, as its file does."""
    with suppress(OSError):
        if text := lock.read_text(errors="replace")[:200].strip():
            return text
    return "another process"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def _build_environment(folder: Path) -> Iterator[None]:
    """Let torch build in `folder` with this Python's `ninja`, which ends with this process."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    if ninja := shutil.which("ninja", path=path):
        wrapper = folder / "bin" / "ninja"
        words = (sys.executable, "-S", "-c", _WITH_PARENT, ninja)
        with suppress(OSError):
            wrapper.parent.mkdir(exist_ok=True)
            wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            wrapper.chmod(0o755)
            path = os.pathsep.join([str(wrapper.parent), path])
    values = {"TORCH_EXTENSIONS_DIR": str(folder.parent), "PATH": path}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_open_in_a_process(path: Path) -> bool:
    """Whether any process of this machine whose descriptors are readable has the file open."""
    if not path.exists():
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(descriptor) == str(path.absolute()):
                return True
    return False
