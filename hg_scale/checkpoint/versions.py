"""Versions of the format: a manifest's seal, and how one of an older version is read.

2  checksums name their algorithm, `xxh3_128:HEX`
1  sha256, in keys of that name; the first ones without a seal
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from hg_scale.checkpoint.checksum import checksum_text, new_digest

CHECKPOINT_VERSION = 2
_SEAL, _SEAL_1 = "manifest_checksum", "manifest_sha256"


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself, which `is_sealed` checks."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read: lists, keys of text
    return {**manifest, _SEAL: _checksum(manifest)}


def is_sealed(manifest: dict[str, Any]) -> bool:
    """Whether it says what it said when it was written; of any version that can be read."""
    if manifest["format_version"] == 1:
        digest = hashlib.sha256(_text(manifest, _SEAL_1)).hexdigest()
        return manifest.get(_SEAL_1, digest) == digest
    return manifest.get(_SEAL) == _checksum(manifest)


def _checksum(manifest: dict[str, Any]) -> str:
    digest = new_digest()
    digest.update(_text(manifest, _SEAL))
    return checksum_text(digest)


def _text(manifest: dict[str, Any], but_for: str) -> bytes:
    """All that it says, in one spelling."""
    rest = {key: value for key, value in manifest.items() if key != but_for}
    return json.dumps(rest, sort_keys=True).encode()


def from_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Files' checksums with their algorithm."""

    def entry(file: Any) -> Any:
        if not isinstance(file, dict) or "sha256" not in file:
            return file  # a fault, for `shape_fault` to name
        rest = {key: value for key, value in file.items() if key != "sha256"}
        return {**rest, "checksum": f"sha256:{file['sha256']}"}

    return {**manifest, "format_version": 2, "files": [entry(file) for file in manifest["files"]]}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: from_version_1}
"""From the manifest of a version to that of the next; others are refused by their number."""
