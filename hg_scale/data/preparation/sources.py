"""Read source text in blocks: files and folders of files, plain or compressed (.gz, .xz, .zst)."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from hg_scale.data.errors import DataError

Advance = Callable[[int], None]  # receives the number of stored bytes read since the last call

_BLOCK = 1 << 20


def _zstd(file: BinaryIO) -> Any:
    import pyarrow  # its reader, unlike others, detects a truncated file

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
_NOT_READ = {
    ".bz2", ".zstd", ".lz4", ".lzma", ".lz", ".lzo", ".z", ".br", ".sz",
    ".7z", ".rar", ".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz",
}  # fmt: skip


def find_files(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the files below `folder` as relative POSIX paths, sorted by their bytes.

    A pattern is matched with the file's name and with its relative path, where `*` also spans
    `/`. Links to folders are not followed. Raises DataError where no file is left, a link to a file
    is broken, or a file has an unsupported compression.
    """

    def matches(path: str, patterns: Sequence[str]) -> bool:
        name = path.rpartition("/")[2]
        return any(fnmatchcase(name, p) or fnmatchcase(path, p) for p in patterns)

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make it readable")

    found = []
    for root, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if not matches(relative, include) or matches(relative, exclude):
                continue
            if path.is_file():
                refuse_unsupported_compression(path)
                found.append(relative)
            elif path.is_symlink() and not path.exists():
                raise DataError(
                    f"{path}: links to {os.readlink(path)!r}, which does not exist; download it, "
                    "or leave the link out with --exclude"
                )
    if not found:
        raise DataError(
            f"{folder}: no file matches --include {' '.join(include)}"
            + (f" without --exclude {' '.join(exclude)}" if exclude else "")
            + "; check the patterns and the folder"
        )
    return sorted(found, key=os.fsencode)


def is_compressed(path: Path) -> bool:
    """Return whether the file is compressed, by its name."""
    return path.suffix.lower() in _OPENERS


def refuse_unsupported_compression(path: Path) -> None:
    """Raise DataError where a file, by its name, has an unsupported compression."""
    if path.suffix.lower() in _NOT_READ:
        raise DataError(
            f"{path}: {path.suffix} files are not supported; decompress it, or compress it as "
            f"{', '.join(_OPENERS)}, or leave it out with --exclude"
        )


def read_blocks(path: Path, begin: int = 0, advance: Advance | None = None) -> Iterator[bytes]:
    """Yield the decompressed text of a file in blocks of at most 1 MiB.

    `begin` skips bytes of a plain file. Raises DataError where the file cannot be read or
    decompressed.
    """
    try:
        with path.open("rb") as stored:
            stored.seek(begin)
            file = _OPENERS[path.suffix.lower()](stored) if is_compressed(path) else stored
            counted = begin
            with closing(file):
                while block := file.read(_BLOCK):
                    if advance:
                        advance(stored.tell() - counted)
                        counted = stored.tell()
                    yield block
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise _corrupt(path, error) from None
    except OSError as error:
        if error.errno is None and is_compressed(path):  # from the zstd reader
            raise _corrupt(path, error) from None
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _corrupt(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be decompressed ({error}); expected a complete {path.suffix} file: "
        "download it again, or rename it if it is not compressed"
    )


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
