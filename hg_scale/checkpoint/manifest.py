"""The manifest of a checkpoint: its schema, its checksum of itself, and older format versions.

Version 2: checksums name their algorithm, `xxh3_128:HEX`.
Version 1: sha256 checksums under keys of that name; its first manifests have none of themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hg_scale.checkpoint.checksum import CHECKSUM_MISMATCH, format_checksum, new_digest
from hg_scale.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
CHECKPOINT_VERSION = 2
_SEAL, _SEAL_1 = "manifest_checksum", "manifest_sha256"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, migrated to the current format version.

    Raises CheckpointError if it is missing, not JSON, of a version that cannot be read, lacks a
    key, or if its checksum of itself is missing or differs.
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
    if not _seal_matches(manifest):
        raise CheckpointError(f"{path}: {CHECKSUM_MISMATCH}")
    while version != CHECKPOINT_VERSION:
        manifest = MIGRATIONS[version](manifest)
        version = manifest["format_version"]
    if problem := _schema_problem(manifest):
        raise CheckpointError(f"{path}: {problem}; use another checkpoint")
    return manifest


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with a checksum of itself added, which `read_manifest` compares."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read: lists, string keys
    return {**manifest, _SEAL: _manifest_checksum(manifest)}


def _seal_matches(manifest: dict[str, Any]) -> bool:
    if manifest["format_version"] == 1:
        digest = hashlib.sha256(_canonical_json(manifest, _SEAL_1)).hexdigest()
        return manifest.get(_SEAL_1, digest) == digest
    return manifest.get(_SEAL) == _manifest_checksum(manifest)


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    digest = new_digest()
    digest.update(_canonical_json(manifest, _SEAL))
    return format_checksum(digest)


def _canonical_json(manifest: dict[str, Any], seal_key: str) -> bytes:
    rest = {key: value for key, value in manifest.items() if key != seal_key}
    return json.dumps(rest, sort_keys=True).encode()


def _from_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Prefix the checksum of each file with its algorithm."""

    def migrate(file: Any) -> Any:
        if not isinstance(file, dict) or "sha256" not in file:
            return file  # `_schema_problem` reports it
        rest = {key: value for key, value in file.items() if key != "sha256"}
        return {**rest, "checksum": f"sha256:{file['sha256']}"}

    return {**manifest, "format_version": 2, "files": [migrate(file) for file in manifest["files"]]}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}
"""Older versions that can be read: each function migrates a manifest to the next version."""


class _Part(BaseModel):
    """Strict about types; extra keys are allowed."""

    model_config = ConfigDict(strict=True)


class _Fragment(_Part):
    name: str
    shape: list[int]
    dim: int | None
    index: int
    count: int = Field(ge=1)
    start: int = Field(ge=0)
    length: int = Field(ge=0)


class _File(_Part):
    name: str = Field(pattern=r"^[^/\\]+$")  # in the checkpoint's own folder
    bytes: int
    checksum: str = Field(pattern=r"^(xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")
    fragments: list[_Fragment]


class _Progress(_Part):
    step: int
    position: int
    skipped: int
    data: dict[str, Any]


class _Layout(_Part):
    tensor: int
    pipeline: int
    data: int
    zero_stage: int


class _Config(_Part):
    model: dict[str, Any]


class _Manifest(_Part):
    step: int
    progress: _Progress
    optimizer_step: int
    layout: _Layout
    config: _Config
    versions: dict[str, str | None]
    files: list[_File]


def _schema_problem(manifest: dict[str, Any]) -> str | None:
    """Describe the first key that is missing or of another type; None if the manifest is valid."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg'].lower()}"
    return None
