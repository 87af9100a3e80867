"""The output folder of a conversion: it appears complete under its name, or not at all."""

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
    """Yield a hidden folder beside `out` to write into; flush it and rename it to `out` at the end.

    The hidden folder is removed on any error; one that a killed process left is cleared by the next
    call for the same `out`. Raises CheckpointError if `out` exists or cannot be written.
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
            for path in sorted(temporary.rglob("*"), reverse=True):
                sync_path(path)
            sync_path(temporary)
            os.rename(temporary, out)
            sync_path(out.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{out}: cannot be written: {error.strerror or error}; partial output was removed"
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
