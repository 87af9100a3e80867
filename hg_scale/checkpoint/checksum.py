"""Checksums of the files of a checkpoint, written as `ALGORITHM:HEX` (`xxh3_128:0f3a...`).

They detect accidental corruption, not forgery, so a fast non-cryptographic hash is used: sha256
takes more CPU time than the write itself, and takes it from training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from hg_scale.bounded_read import open_regular
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs

ALGORITHM = "xxh3_128"
CHECKSUM_MISMATCH = "changed since it was written (checksum differs)"


class Digest(Protocol):
    """The interface of hashlib's hash objects."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


ALGORITHMS: dict[str, Callable[[], Digest]] = {
    ALGORITHM: xxhash.xxh3_128,
    "sha256": hashlib.sha256,  # of format version 1
}


def new_digest() -> Digest:
    """Return an empty digest of the current algorithm; `format_checksum` reads it."""
    return ALGORITHMS[ALGORITHM]()


def format_checksum(digest: Digest) -> str:
    """Return the checksum of everything that a `new_digest` was updated with."""
    return f"{ALGORITHM}:{digest.hexdigest()}"


@dataclass(frozen=True)
class ComputeChecksum:
    """Job: compute the checksum of a file of `folder`. Raises OSError."""

    folder: Path

    def __call__(self, file: str, algorithm: str = ALGORITHM) -> str:
        with open_regular(self.folder / file) as data:
            digest = hashlib.file_digest(data, ALGORITHMS[algorithm])  # type: ignore[arg-type]
            return f"{algorithm}:{digest.hexdigest()}"


@dataclass(frozen=True)
class CompareChecksum:
    """Job: return whether a file of `folder` still has the checksum of its manifest entry."""

    folder: Path

    def __call__(self, entry: dict[str, Any]) -> bool:
        algorithm, _, _ = entry["checksum"].partition(":")
        return ComputeChecksum(self.folder)(entry["name"], algorithm) == entry["checksum"]


def corrupt_files(
    checkpoint: Path, files: Sequence[dict[str, Any]], workers: int, report: ProgressReporter
) -> Iterator[str]:
    """Yield one line for each file of a manifest whose checksum differs."""
    entries = [{key: file[key] for key in ("name", "bytes", "checksum")} for file in files]
    report.begin("checksums", sum(entry["bytes"] for entry in entries))
    for entry, unchanged in run_jobs(CompareChecksum(checkpoint), entries, workers):
        report.advance(entry["bytes"])
        if not unchanged:
            yield f"{checkpoint / entry['name']}: {CHECKSUM_MISMATCH}"
