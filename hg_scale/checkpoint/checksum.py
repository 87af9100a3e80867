"""Whether the bytes of a checkpoint are still those that were written.

A checksum names its algorithm: `xxh3_128:HEX`. It has to show accidents, not to resist somebody who
makes two files alike, so it is of the fast kind: sha256 takes more processor time than writing,
and takes it from training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs

ALGORITHM = "xxh3_128"
CHANGED = "changed since it was written (checksum differs)"


class Digest(Protocol):
    """As hashlib's."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


ALGORITHMS: dict[str, Callable[[], Digest]] = {
    ALGORITHM: xxhash.xxh3_128,
    "sha256": hashlib.sha256,  # of format version 1
}


def new_digest() -> Digest:
    """Of what is being written; `checksum_text` gives its checksum."""
    return ALGORITHMS[ALGORITHM]()


def checksum_text(digest: Digest) -> str:
    """The checksum of all that a `new_digest` has been updated with."""
    return f"{ALGORITHM}:{digest.hexdigest()}"


@dataclass(frozen=True)
class Checksum:
    """The checksum of a file of `folder`; sent to the workers. Raises OSError."""

    folder: Path

    def __call__(self, file: str, algorithm: str = ALGORITHM) -> str:
        with (self.folder / file).open("rb") as data:
            digest = hashlib.file_digest(data, ALGORITHMS[algorithm])  # type: ignore[arg-type]
            return f"{algorithm}:{digest.hexdigest()}"


@dataclass(frozen=True)
class Changed:
    """Whether a file of `folder` has another checksum than its entry in the manifest."""

    folder: Path

    def __call__(self, entry: dict[str, Any]) -> bool:
        algorithm, _, _ = entry["checksum"].partition(":")
        return Checksum(self.folder)(entry["name"], algorithm) != entry["checksum"]


def changed_files(
    checkpoint: Path, files: Sequence[dict[str, Any]], workers: int, report: ProgressReporter
) -> Iterator[str]:
    """One line for each file of a manifest whose bytes are not those that were written."""
    entries = [{key: file[key] for key in ("name", "bytes", "checksum")} for file in files]
    report.begin("checksums", sum(entry["bytes"] for entry in entries))
    for entry, changed in run_jobs(Changed(checkpoint), entries, workers):
        report.advance(entry["bytes"])
        if changed:
            yield f"{checkpoint / entry['name']}: {CHANGED}"
