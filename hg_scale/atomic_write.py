"""Write files atomically: a reader sees the old content or the new content, never a part of it.

A file is written under a partial name that no other process uses, then renamed. The durable
variants also sync the content before the rename and the folder after it, so that the file survives
a power loss.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # suffix of a file that is still being written


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file without syncing it: for status files that are rewritten all the time."""
    partial = partial_path(path)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a line of JSON, without syncing it."""
    write_atomic(path, json.dumps(value) + "\n")


def write_durable(path: Path, content: str | bytes) -> None:
    """Write a small file and sync it and its folder."""
    with durable_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def durable_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing; it appears at `path`, synced, if the block ends without an error."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            commit(file, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return a name beside `path` that no other process uses, to write the file under."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def commit(partial: IO[bytes], path: Path, *, sync_folder: bool = True) -> None:
    """Sync and close an open partial file, rename it to `path` and sync the folder.

    Without `sync_folder` a power loss may undo the rename, but never leave a part of the content.
    """
    partial.flush()
    os.fsync(partial.fileno())
    partial.close()
    os.replace(partial.name, path)
    if sync_folder:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Sync a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
