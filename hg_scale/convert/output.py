"""The folder that a conversion writes: there whole, under its name, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hg_scale.atomic_write import sync_path
from hg_scale.checkpoint.errors import CheckpointError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; synced and renamed to `out` at the end.

    Where anything fails it is removed; what a killed conversion left is removed by the next one to
    the same place. Raises CheckpointError where something is at `out`, or it cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: exists already; name a new folder, or remove it")
    temporary = out.with_name(f".{out.name}.converting")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{out}: another process is writing it") from None
        _clear(temporary)
        try:
            yield temporary
            _sync(temporary)
            os.rename(temporary, out)
            sync_path(out.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{out}: cannot be written: {error.strerror or error}; nothing of it was kept"
            ) from None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """Put all below a folder on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)
