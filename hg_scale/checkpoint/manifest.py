"""The manifest of a checkpoint: its schema, its checksum of itself, and older format versions.

Version 2: checksums name their algorithm, `xxh3_128:HEX`.
Version 1: sha256 checksums under keys of that name; its first manifests have none of themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hg_scale.bounded_read import (
    TABLE_BYTES,
    Count,
    FileName,
    FormatError,
    format_errors,
    read_json,
    validated,
)
from hg_scale.checkpoint.checksum import CHECKSUM_MISMATCH, format_checksum, new_digest
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.data.tokenizer import TokenizerIdentity

MANIFEST = "manifest.json"
CHECKPOINT_VERSION = 2
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
_SEAL, _SEAL_1 = "manifest_checksum", "manifest_sha256"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, migrated to the current format version.

    Raises CheckpointError if it is missing, not JSON, of a version that cannot be read, lacks a
    key, or if its checksum of itself is missing or differs.
    """
    path = checkpoint / MANIFEST
    with format_errors(path, CheckpointError):
        try:
            manifest = read_json(path, TABLE_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; the save was never finished") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise CheckpointError(f"{path}: lists no files; use another checkpoint")
    version = manifest.get("format_version")
    if type(version) is not int or version not in (CHECKPOINT_VERSION, *MIGRATIONS):
        newer = isinstance(version, int) and version > CHECKPOINT_VERSION
        remedy = "update hg_scale" if newer else "read it with the hg_scale that wrote it"
        raise CheckpointError(
            f"{path}: format version {version!s:.40}, expected {CHECKPOINT_VERSION}; {remedy}"
        )
    if not _seal_matches(manifest):
        raise CheckpointError(f"{path}: {CHECKSUM_MISMATCH}")
    while version != CHECKPOINT_VERSION:
        manifest = MIGRATIONS[version](manifest)
        version = manifest["format_version"]
    with format_errors(path, CheckpointError, "; use another checkpoint"):
        parsed: _Manifest = validated(_Manifest, manifest)
        _require_agreement(parsed, checkpoint)
    for owner, part in ((manifest, parsed), (manifest["progress"]["data"], parsed.progress.data)):
        if isinstance(part.tokenizer, TokenizerIdentity):
            owner["tokenizer"] = part.tokenizer.model_dump()  # with all keys
    return manifest


def _require_agreement(manifest: _Manifest, checkpoint: Path) -> None:
    """Raise FormatError if files are named twice, or steps differ.

    With another step in the name of the folder, training would resume at one step and take the
    folder for newer than what it saves later.
    """
    step, match = manifest.step, STEP_FOLDER.fullmatch(checkpoint.name)
    if match and int(match[1]) != step:
        raise FormatError(
            f"expected {int(match[1])} as the folder is named, found {step}", ("step",)
        )
    if manifest.progress.step != step:
        raise FormatError(f"expected {step}, found {manifest.progress.step}", ("progress", "step"))
    repeated = [name for name, n in Counter(f.name for f in manifest.files).items() if n > 1]
    if repeated:
        raise FormatError(f"{repeated[0]} is listed twice", ("files",))


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
            return file  # the schema reports it
        rest = {key: value for key, value in file.items() if key != "sha256"}
        return {**rest, "checksum": f"sha256:{file['sha256']}"}

    return {**manifest, "format_version": 2, "files": [migrate(file) for file in manifest["files"]]}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}
"""Older versions that can be read: each function migrates a manifest to the next version."""


class _Part(BaseModel):
    """Strict about types; extra keys are allowed."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Fragment(_Part):
    name: str
    shape: list[Annotated[int, Field(ge=1, lt=1 << 48)]] = Field(max_length=8)
    dim: int | None
    index: Count
    count: int = Field(ge=1, lt=1 << 48)
    start: Count
    length: Count


class _File(_Part):
    name: FileName  # in the checkpoint's own folder
    bytes: Count
    checksum: str = Field(pattern=r"^(xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")
    fragments: list[_Fragment]


class _DataState(_Part):
    """The key of the data's state that the first manifests have nowhere else."""

    tokenizer: TokenizerIdentity | Annotated[dict[str, Any], Field(max_length=0)] | None = None


class ProgressEntry(_Part):
    """The progress of training, as in the manifest."""

    step: Count
    position: Count
    skipped: Count
    data: _DataState


class _Layout(_Part):
    tensor: Count
    pipeline: Count
    data: Count
    zero_stage: Count


class _Guard(_Part):
    losses: list[float] = []
    skipped: list[Count] = []


class _Corpus(_Part):
    path: str | None = None


class _Corpora(_Corpus):
    sources: list[_Corpus] | None = None


class _Training(_Part):
    seed: int | None = None


class _Config(_Part):
    """The configuration of the run; its sections are objects in every version."""

    model: dict[str, Any]
    data: _Corpora = _Corpora()
    training: _Training = _Training()
    optimizer: dict[str, Any] = {}
    schedule: dict[str, Any] = {}


class _Manifest(_Part):
    step: Count
    progress: ProgressEntry
    optimizer_step: Count
    moments: bool = True
    layout: _Layout
    guard: _Guard = _Guard()
    config: _Config
    tokenizer: TokenizerIdentity | Annotated[dict[str, Any], Field(max_length=0)] | None = None
    versions: dict[str, str | None]
    source: dict[str, str | int | None] = {}
    files: list[_File]
