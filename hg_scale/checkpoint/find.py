"""Checkpoints in a folder: which are whole, which is the newest, what is in one.

A checkpoint is a folder `step-00000020` with one safetensors file a rank and a manifest, written
last; it exists when its manifest does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.checksum import CHANGED, Changed
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.manifest import shape_fault
from hg_scale.checkpoint.versions import CHECKPOINT_VERSION, MIGRATIONS, is_sealed

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08}"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """All checkpoints by step, whole or damaged."""
    return {int(m[1]): p for p in folder.iterdir() if (m := _FOLDER.fullmatch(p.name))}


def find_latest(
    folder: Path,
    report: Callable[[str], None] = lambda _: None,
    known: Mapping[Path, str] | None = None,
) -> Path | None:
    """The newest whole checkpoint; damaged ones are reported by name and passed over.

    `known` are faults found by other means, as by `content_damage`. None where the folder holds no
    checkpoint at all. Raises CheckpointError where it holds some and none is whole: to begin anew
    then would throw the run away.
    """
    if not folder.is_dir():
        return None
    steps = checkpoints_in(folder)
    faults: list[tuple[Path, str]] = []
    for step in sorted(steps, reverse=True):
        fault = (known or {}).get(steps[step]) or damage(steps[step])
        if fault is None:
            for path, met in faults:
                report(f"passing over {path}: {met}")
            return steps[step]
        faults.append((steps[step], fault))
    if faults:
        newest, fault = faults[0]
        raise CheckpointError(
            f"{folder}: none of the checkpoints here is whole (the newest, {newest.name}: {fault})"
            "; bring one back, or begin anew in another run folder"
        )
    return None


def newest_of(
    path: Path,
    report: Callable[[str], None] = lambda _: None,
    known: Mapping[Path, str] | None = None,
) -> Path:
    """The checkpoint that a path means: a run folder its newest whole one, as `find_latest`."""
    return find_latest(path / "checkpoints", report, known) or path


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None. Looks at names and sizes, not at contents."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    faults = (_size_damage(checkpoint, file) for file in manifest["files"])
    return next((fault for fault in faults if fault), None)


def content_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """As `damage`, of every `parts`-th file from the `part`-th on, and with their checksums.

    So the ranks of a world share the reading.
    """
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    for file in manifest["files"][part::parts]:
        if fault := _size_damage(checkpoint, file):
            return fault
        try:
            if Changed(checkpoint)(file):
                return f"{file['name']}: {CHANGED}"
        except OSError as error:
            return f"{file['name']} cannot be read: {error.strerror}"
    return None


def _size_damage(checkpoint: Path, file: dict[str, Any]) -> str | None:
    try:
        size = (checkpoint / file["name"]).stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{file['name']} {'is missing' if missing else f'cannot be read: {error.strerror}'}"
    if size != file["bytes"]:
        return f"{file['name']} has {size} bytes, expected {file['bytes']}"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, as of the current format version.

    Raises CheckpointError where it is missing, broken, changed since it was written (or says no
    checksum of itself), of a version that cannot be read, or lacks what every manifest says.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the save was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise CheckpointError(f"{path}: lists no files; use another checkpoint")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version not in (CHECKPOINT_VERSION, *MIGRATIONS):
        newer = isinstance(version, int) and version > CHECKPOINT_VERSION
        remedy = "update hg_scale" if newer else "read it with the hg_scale that wrote it"
        raise CheckpointError(
            f"{path}: format version {version}, expected {CHECKPOINT_VERSION}; {remedy}"
        )
    if not is_sealed(manifest):
        raise CheckpointError(f"{path}: {CHANGED}")
    while version != CHECKPOINT_VERSION:
        manifest = MIGRATIONS[version](manifest)
        version = manifest["format_version"]
    if fault := shape_fault(manifest):
        raise CheckpointError(f"{path}: {fault}; use another checkpoint")
    return manifest
