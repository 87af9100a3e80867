"""Read source text in blocks: files and folders of files, plain or compressed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.compression import (
    Compression,
    DecompressionError,
    compression_of,
    decompressed,
)
from hg_scale.data.preparation.skipping import STOP, SkipLog

Advance = Callable[[int], None]  # receives the number of stored bytes read since the last call

_BLOCK = 1 << 20


_SUFFIXES = {
    ".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2",
}  # fmt: skip
_NOT_READ = {
    ".lz4", ".lzma", ".lz", ".lzo", ".z", ".br", ".sz",
    ".7z", ".rar", ".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz",
}  # fmt: skip


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Whether a relative path, or the file's name, matches one of the patterns."""
    name = path.rpartition("/")[2]
    return any(fnmatchcase(name, p) or fnmatchcase(path, p) for p in patterns)


def find_files(
    folder: Path, include: Sequence[str], exclude: Sequence[str], log: SkipLog = STOP
) -> list[str]:
    """Return the files below `folder` as relative POSIX paths, sorted by their bytes.

    A pattern is matched with the file's name and with its relative path, where `*` also spans
    `/`. Links to folders are not followed. A folder that cannot be read, a broken link and a file
    of an unsupported compression go to `log`. Raises DataError where no file is left.
    """

    def refuse(error: OSError) -> None:
        reason = f"{error.filename}: cannot be read ({error.strerror}); make it readable"
        log.skip(error.filename, "file", None, reason)

    found = []
    for root, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if not matches_any(relative, include) or matches_any(relative, exclude):
                continue
            if path.is_file():
                try:
                    refuse_unsupported_compression(path)
                except DataError as error:
                    log.skip(path, "file", None, error)
                else:
                    found.append(relative)
            elif path.is_symlink() and not path.exists():
                log.skip(
                    path,
                    "file",
                    None,
                    f"{path}: links to {os.readlink(path)!r}, which does not exist; download it, "
                    "or leave the link out with --exclude",
                )
    if not found:
        raise DataError(
            f"{folder}: no file matches --include {' '.join(include)}"
            + (f" without --exclude {' '.join(exclude)}" if exclude else "")
            + "; check the patterns and the folder"
        )
    return sorted(found, key=os.fsencode)


def detect_compression(path: Path) -> Compression | None:
    """Return how a file is compressed, by its first bytes; None where it is plain.

    The name does not matter: gzip may be called `.dz` or `.txt`. Raises DataError where the file
    cannot be read, or its name promises a compression that its contents do not have.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    compression, promised = compression_of(head), _SUFFIXES.get(path.suffix.lower())
    if promised and not head:
        raise DataError(
            f"{path}: is empty, as after an unfinished copy; download it again, or leave it out "
            "with --exclude"
        )
    if promised and (compression is None or compression.name != promised):
        found = f"{compression.name} data" if compression else f"no {promised} data"
        raise DataError(
            f"{path}: cannot be decompressed (it contains {found}); download it again, or rename it"
        )
    return compression


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its contents. Raises as `detect_compression`."""
    return detect_compression(path) is not None


def uncompressed_name(path: Path) -> str:
    """Return the name without the suffix of a compression: `a.jsonl` for `a.jsonl.gz`."""
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def refuse_unsupported_compression(path: Path) -> None:
    """Raise DataError where a file, by its name, has an unsupported compression."""
    if path.suffix.lower() in _NOT_READ:
        raise DataError(
            f"{path}: {path.suffix} files are not supported; decompress it, or compress it as "
            f"{', '.join(_SUFFIXES)}, or leave it out with --exclude"
        )


def read_blocks(path: Path, begin: int = 0, advance: Advance | None = None) -> Iterator[bytes]:
    """Yield the decompressed text of a file in blocks of at most 1 MiB.

    `begin` skips bytes of a plain file. Raises DataError where the file cannot be read or
    decompressed.
    """
    compression = detect_compression(path)
    try:
        with path.open("rb") as stored:
            stored.seek(begin)
            counted = begin
            blocks = decompressed(stored, compression, _BLOCK) if compression else _plain(stored)
            for block in blocks:
                if advance:
                    advance(stored.tell() - counted)
                    counted = stored.tell()
                yield block
    except DecompressionError as error:
        name = compression.name if compression else ""
        raise DataError(
            f"{path}: cannot be decompressed ({error}); expected a complete {name} file: download "
            "it again, or leave it out with --exclude"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def text_length(path: Path) -> int:
    """Return the bytes of a file's text; a compressed file is decompressed to count them."""
    if is_compressed(path):
        return sum(len(block) for block in read_blocks(path))
    return path.stat().st_size


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as it is stored. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
