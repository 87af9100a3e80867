"""Small or read-only disks for tests: a tmpfs, where this user may mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Mount = Callable[[Path, int], None]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of `size` bytes at `folder`; skip the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def make_read_only(folder: Path) -> None:
    """Remount the disk at `folder` read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=20)


@pytest.fixture
def mount() -> Iterator[Mount]:
    """`mount(folder, size)` mounts a small disk until the end of the test."""
    with ExitStack() as stack:
        yield lambda folder, size: stack.enter_context(small_disk(folder, size))
