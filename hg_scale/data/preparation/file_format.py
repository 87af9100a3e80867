"""Which format a file of a corpus has: the one place where every reader looks.

The first bytes decide, then the name: Parquet is read as Parquet whatever it is called, and only a
name tells JSON lines from plain text. What is compressed is looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.signatures import (
    ARROW_FILE,
    ARROW_STREAM,
    HEAD_BYTES,
    PARQUET,
    SAMPLE_BYTES,
    binary_by_statistics,
    signature_of,
)
from hg_scale.data.preparation.skipping import STOP, SkipLog, SkippingRefused
from hg_scale.data.preparation.sources import (
    COMPRESSED_SUFFIXES,
    detect_compression,
    first_bytes,
    unsupported_suffix,
)

FileFormat = Literal["text", "lines", "csv", "tsv", "parquet", "arrow file", "arrow stream"]
TABLES: tuple[FileFormat, ...] = ("parquet", "arrow file", "arrow stream")

_BY_SIGNATURE: dict[str, FileFormat] = {
    PARQUET: "parquet", ARROW_FILE: "arrow file", ARROW_STREAM: "arrow stream",
}  # fmt: skip
_BY_SUFFIX: dict[str, FileFormat] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
_PROMISES = {
    ".parquet": "Parquet", ".pq": "Parquet", ".parq": "Parquet", ".arrow": "Arrow",
    ".feather": "Arrow",
}  # fmt: skip
_MAX_SIGNATURE = 64  # bytes that tell tables from everything else
_SHOWN = 3  # files that are named in an error
_IMAGE_HINT = "data_prep/prepare_images.py reads images"
_TABLE_HINT = "data_prep/prepare_text.py reads its rows"
_REMEDIES = {
    PARQUET: _TABLE_HINT,
    ARROW_FILE: _TABLE_HINT,
    ARROW_STREAM: _TABLE_HINT,
    "UTF-16": "convert it with iconv -f UTF-16 -t UTF-8",
    "UTF-32": "convert it with iconv -f UTF-32 -t UTF-8",
    "a Git LFS pointer": "download its contents with git lfs pull",
    "encrypted Parquet": "write it without encryption",
    "Feather version 1": "write it as Feather version 2",
    "a PDF document": "extract its text",
    "a NumPy array": _IMAGE_HINT,
    "a NumPy .npz archive": _IMAGE_HINT,
}


@dataclass(frozen=True)
class FileContents:
    """What a file contains. `binary`: what it is if it is no text and no table that is read."""

    format: FileFormat
    compressed: bool
    binary: str | None = None


def format_of(path: Path) -> FileFormat:
    """Return the format of a file, by its first bytes and its name. Raises DataError.

    What is neither text nor a table is called text here; `inspect_file` tells.
    """
    compression = detect_compression(path)
    head = first_bytes(path, _MAX_SIGNATURE, compression)
    named = format_by_name(path, compression is not None)
    return _BY_SIGNATURE.get(signature_of(head) or "", named)


def format_by_name(path: Path, compressed: bool = False) -> FileFormat:
    """Return the text format that a name stands for, also below the suffix of a compression.

    `a.jsonl`, `a.jsonl.gz`, a compressed `a.jsonl.dz` and `a.jsonl.tmp` are JSON lines. Tables are
    recognised by their contents only.
    """
    suffix = path.suffix.lower()
    if suffix not in _BY_SUFFIX and (compressed or suffix in (*COMPRESSED_SUFFIXES, ".tmp")):
        suffix = Path(path.stem).suffix.lower()
    return _BY_SUFFIX.get(suffix, "text")


def inspect_file(path: Path) -> FileContents:
    """Return what a file contains, by samples of its bytes. Raises DataError where that fails.

    A plain file is sampled at its beginning, in its middle and at its end; a compressed one at its
    beginning.
    """
    if (suffix := unsupported_suffix(path)) is not None:
        return FileContents("text", False, f"{suffix} data")
    compression = detect_compression(path)
    compressed = compression is not None
    head = first_bytes(path, HEAD_BYTES, compression)
    found = signature_of(head)
    if found in _BY_SIGNATURE:
        return FileContents(_BY_SIGNATURE[found], compressed)
    if found is None:
        samples = [head] if compressed else [head, *_later_samples(path)]
        found = next(filter(None, map(binary_by_statistics, samples)), None)
    elif compressed:
        found = f"{found} in a compressed file"
    promise = _promised(path)
    if promise and head:
        found = f"no {promise} file, but {found or 'text'}"
    return FileContents(format_by_name(path, compressed), compressed, found)


def _promised(path: Path) -> str | None:
    """Return the table format that the last two suffixes of a name promise, if any."""
    return next((_PROMISES[s.lower()] for s in path.suffixes[-2:] if s.lower() in _PROMISES), None)


def is_never_empty(path: Path, contents: FileContents) -> bool:
    """Return whether an empty file of this kind is a sign of an unfinished copy."""
    return contents.compressed or contents.format in TABLES or _promised(path) is not None


def _later_samples(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    if size <= HEAD_BYTES:
        return
    middle = max(HEAD_BYTES, (size - SAMPLE_BYTES) // 2 & ~3)  # a multiple of 4, for UTF-32
    end = max(HEAD_BYTES, (size - SAMPLE_BYTES) & ~3)
    with path.open("rb") as file:
        for offset in sorted({middle, end}):
            file.seek(offset)
            yield file.read(SAMPLE_BYTES)


def inspect_files(
    paths: Sequence[Path], log: SkipLog = STOP, *, only_text: bool = False, option: bool = True
) -> dict[Path, FileContents]:
    """Return what each file contains that can be read. Binary files go to `log`.

    `only_text`: tables are refused, too. `option`: whether the command that reads the files has
    the option --bytes-as-they-are. Raises SkippingRefused in one line for all binary files.
    """
    contents, refused = {}, []
    for path in paths:
        try:
            found = inspect_file(path)
        except DataError as error:
            log.skip(path, "file", None, error)
            continue
        binary = found.binary
        if only_text and found.format in TABLES:
            binary = next(name for name, kind in _BY_SIGNATURE.items() if kind == found.format)
        if binary is None:
            contents[path] = found
        else:
            refused.append((path, binary))
    if refused and log.policy.on_fault == "stop":
        raise SkippingRefused(_refusal(refused, len(paths), option))
    for path, binary in refused:
        log.skip(path, "file", None, _refusal([(path, binary)], len(paths), option))
    return contents


def _refusal(refused: Sequence[tuple[Path, str]], total: int, option: bool) -> str:
    path, binary = refused[0]
    last = "; to take the bytes of every file as they are, set --bytes-as-they-are"
    last = last if option else ""
    if len(refused) == 1:
        remedy = _remedy(binary)
        where = ", or leave it out with --exclude" if total > 1 else ""
        what = binary if binary.startswith("no ") else f"{binary}, not text"
        return f"{path}: is {what}; {remedy}{where}{last}"
    named = ", ".join(f"{path} ({binary})" for path, binary in refused[:_SHOWN])
    more = f" and {len(refused) - _SHOWN:,} more" if len(refused) > _SHOWN else ""
    return (
        f"{named}{more}: {len(refused):,} of {total:,} files are not text; convert or decompress "
        f"them, or leave them out with --exclude{last}"
    )


def _remedy(binary: str) -> str:
    if binary in _REMEDIES:
        return _REMEDIES[binary]
    if "Git LFS" in binary:
        return _REMEDIES["a Git LFS pointer"]
    if binary.endswith("image"):
        return _IMAGE_HINT
    if "archive" in binary or "data" in binary.split():
        return "decompress it, or compress it with gzip, xz, zstd or bzip2"
    return "download it again" if binary.startswith("no ") else "convert it to text"
