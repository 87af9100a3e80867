"""Checkpoints in a folder: which are whole, which is the newest, what is in one.

A checkpoint is a folder `step-00000020` with one safetensors file a rank and a manifest, written
last; it exists when its manifest does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08}"


def find_latest(folder: Path, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint; damaged ones are reported by name and passed over.

    None where the folder holds no checkpoint at all. Raises CheckpointError where it holds some and
    none is whole: to begin anew then would throw the run away.
    """
    if not folder.is_dir():
        return None
    steps = {int(m[1]): p for p in folder.iterdir() if (m := _FOLDER.fullmatch(p.name))}
    faults: list[tuple[Path, str]] = []
    for step in sorted(steps, reverse=True):
        fault = damage(steps[step])
        if fault is None:
            for path, known in faults:
                report(f"passing over {path}: {known}")
            return steps[step]
        faults.append((steps[step], fault))
    if faults:
        newest, fault = faults[0]
        raise CheckpointError(
            f"{folder}: none of the checkpoints here is whole (the newest, {newest.name}: {fault})"
            "; bring one back, or begin anew in another run folder"
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None. Looks at names and sizes, not at contents."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    for file in manifest["files"]:
        path = checkpoint / file["name"]
        if not path.is_file():
            return f"{file['name']} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{file['name']} has {path.stat().st_size} bytes, expected {file['bytes']}"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest. Raises CheckpointError where it is missing, broken or of another format."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the save was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
    if not isinstance(manifest.get("files"), list):
        raise CheckpointError(f"{path}: lists no files; use another checkpoint")
    return manifest
