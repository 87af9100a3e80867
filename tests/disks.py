"""Disks that are small or read-only: a tmpfs of their own, where this user may mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Mount = Callable[[Path, int], None]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `folder`; skips the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def make_read_only(folder: Path) -> None:
    """From now on nothing can be written on the disk mounted there."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=20)


@pytest.fixture
def mount() -> Iterator[Mount]:
    """`mount(folder, size)`: a small disk until the end of the test."""
    with ExitStack() as stack:
        yield lambda folder, size: stack.enter_context(small_disk(folder, size))
