"""Whether the bytes of a checkpoint are still those that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.jobs import Report, run_jobs


@dataclass(frozen=True)
class Checksum:
    """sha256 of a file of `folder`."""

    folder: Path

    def __call__(self, file: str) -> str:
        with (self.folder / file).open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()


def changed_files(
    checkpoint: Path, files: Sequence[dict[str, Any]], workers: int, report: Report
) -> Iterator[str]:
    """One line for each file of a manifest whose bytes are not those that were written."""
    entries = {file["name"]: file for file in files}
    report.begin("checksums", sum(file["bytes"] for file in files))
    for name, digest in run_jobs(Checksum(checkpoint), entries, workers):
        report.advance(entries[name]["bytes"])
        if digest != entries[name]["sha256"]:
            yield f"{checkpoint / name}: changed since it was written (sha256 differs)"
