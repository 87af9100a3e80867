"""Find the checkpoints in a folder and verify that they are complete.

A checkpoint is a folder `step-00000020` with one safetensors file per rank and a manifest, which is
written last.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.checksum import CHECKSUM_MISMATCH, CompareChecksum
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.manifest import STEP_FOLDER, read_manifest
from hg_scale.checkpoint.mapped_safetensors import header_problem


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step-{step:08}"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return all checkpoints of a folder by step, complete or not."""
    return {int(m[1]): p for p in folder.iterdir() if (m := STEP_FOLDER.fullmatch(p.name))}


def find_latest(
    folder: Path,
    report: Callable[[str], None] = lambda _: None,
    corrupt: Mapping[Path, str] | None = None,
) -> Path | None:
    """Return the newest complete checkpoint; each incomplete one that is skipped is reported.

    corrupt: checkpoints to skip although names and sizes are right (`verify_checksums`), with the
    reason. Returns None if the folder holds no checkpoint at all. Raises CheckpointError if it
    holds some but no complete one: to start from scratch would then throw the run away.
    """
    if not folder.is_dir():
        return None
    checkpoints = checkpoints_in(folder)
    skipped: list[tuple[Path, str]] = []
    for _, path in sorted(checkpoints.items(), reverse=True):
        problem = (corrupt or {}).get(path) or verify_sizes(path)
        if problem is None:
            for older, why in skipped:
                report(f"skipping {older}: {why}")
            return path
        skipped.append((path, problem))
    if skipped:
        newest, problem = skipped[0]
        raise CheckpointError(
            f"{folder}: none of the checkpoints is complete (the newest, {newest.name}: {problem})"
            "; restore one, or start from scratch in another run folder"
        )
    return None


def resolve_checkpoint(
    path: Path,
    report: Callable[[str], None] = lambda _: None,
    corrupt: Mapping[Path, str] | None = None,
) -> Path:
    """Return the newest complete checkpoint if `path` is a run folder, else `path` itself.

    Other arguments and errors as of `find_latest`.
    """
    return find_latest(path / "checkpoints", report, corrupt) or path


def verify_sizes(checkpoint: Path) -> str | None:
    """Return why a checkpoint is incomplete, or None. Compares file sizes, reads no contents."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    problems = (_size_problem(checkpoint, file) for file in manifest["files"])
    return next((problem for problem in problems if problem), None)


def verify_checksums(checkpoint: Path, index: int = 0, count: int = 1) -> str | None:
    """Return why a checkpoint is incomplete or corrupt, or None. Reads and hashes its files.

    Verifies every `count`-th file from the `index`-th on, so that ranks can divide the files.
    """
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    for file in manifest["files"][index::count]:
        if problem := _size_problem(checkpoint, file):
            return problem
        try:
            if not CompareChecksum(checkpoint)(file):
                return f"{file['name']}: {CHECKSUM_MISMATCH}"
        except OSError as error:
            return f"{file['name']} cannot be read: {error.strerror}"
        if problem := header_problem(checkpoint, file):
            return problem
    return None


def _size_problem(checkpoint: Path, file: dict[str, Any]) -> str | None:
    try:
        status = (checkpoint / file["name"]).stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{file['name']} {'is missing' if missing else f'cannot be read: {error.strerror}'}"
    if not stat.S_ISREG(status.st_mode):
        return f"{file['name']} is no regular file"
    if status.st_size != file["bytes"]:
        return f"{file['name']} has {status.st_size} bytes, expected {file['bytes']}"
    return None
