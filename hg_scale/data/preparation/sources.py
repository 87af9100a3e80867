"""Read source text in blocks, plain or compressed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.compression import (
    Compression,
    DecompressionError,
    compression_of,
    decompressed,
)

Advance = Callable[[int], None]  # receives the number of stored bytes read since the last call

_BLOCK = 1 << 20

COMPRESSED_SUFFIXES = {
    ".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2",
}  # fmt: skip
_NOT_READ = {
    ".lz4", ".lzma", ".lz", ".lzo", ".z", ".br", ".sz",
    ".7z", ".rar", ".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz",
}  # fmt: skip


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
    compression, promised = compression_of(head), COMPRESSED_SUFFIXES.get(path.suffix.lower())
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


def unsupported_suffix(path: Path) -> str | None:
    """Return the suffix of a compression or archive that is not read, if the file has one."""
    suffix = path.suffix.lower()
    return suffix if suffix in _NOT_READ else None


def first_bytes(path: Path, size: int, compression: Compression | None) -> bytes:
    """Return the first decompressed bytes of a file, `size` or the entire file. Raises DataError.

    `compression`: of `detect_compression`.
    """
    head = b""
    for block in _read(path, 0, size, compression, None):
        head += block
        if len(head) >= size:
            break
    return head[:size]


def read_blocks(
    path: Path, begin: int = 0, advance: Advance | None = None, *, as_it_is: bool = False
) -> Iterator[bytes]:
    """Yield the decompressed text of a file in blocks of at most 1 MiB.

    `begin` skips bytes of a plain file. `as_it_is`: do not decompress. Raises DataError where the
    file cannot be read or decompressed.
    """
    compression = None if as_it_is else detect_compression(path)
    return _read(path, begin, _BLOCK, compression, advance)


def _read(
    path: Path, begin: int, block: int, compression: Compression | None, advance: Advance | None
) -> Iterator[bytes]:
    try:
        with path.open("rb") as stored:
            stored.seek(begin)
            counted = begin
            if compression:
                text = decompressed(stored, compression, block)
            else:
                text = _plain(stored, block)
            for content in text:
                if advance:
                    advance(stored.tell() - counted)
                    counted = stored.tell()
                yield content
    except DecompressionError as error:
        name = compression.name if compression else ""
        raise DataError(
            f"{path}: cannot be decompressed ({error}); expected a complete {name} file: download "
            "it again, or leave it out with --exclude"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _plain(file: BinaryIO, block: int) -> Iterator[bytes]:
    while content := file.read(block):
        yield content


def text_length(path: Path, *, as_it_is: bool = False) -> int:
    """Return the bytes of a file's text; a compressed file is decompressed to count them."""
    if not as_it_is and is_compressed(path):
        return sum(len(block) for block in read_blocks(path))
    return path.stat().st_size


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as it is stored. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
