"""What a file holds, by its first bytes: the one place that decides it for every reader.

A name says little: gzip hides under `.dz` or `.txt`, Parquet under a hash in a hub's cache. So the
contents decide what is text and what is binary; of text, the suffix says whether it is JSON lines
or CSV, which look like text to anybody.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.unpack import Packing, UnpackError, packing_of, unpacked

FileKind = Literal["text", "lines", "csv", "parquet", "arrow", "binary"]

HEAD = 1 << 16  # bytes that are looked at
_SUFFIXES: dict[str, FileKind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
_TABLES: tuple[tuple[bytes, FileKind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # a stream of Arrow, as `datasets` writes it
)
_BINARY = (
    (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x04\x22\x4d\x18", "packed with lz4"), (b"\x5d\x00\x00", "packed with lzma"),
    (b"LZIP", "packed with lzip"), (b"\x1f\x9d", "packed with compress"),
    (b"\xff\x06\x00\x00sNaPpY", "packed with snappy"), (b"\x89LZO", "packed with lzo"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"), (b"GIF89a", "a GIF image"), (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"), (b"MM\x00*", "a TIFF image"),
    (b"%PDF-", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an Office document"),
    (b"\x93NUMPY", "a NumPy array"), (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\x00", "an SQLite database"), (b"Obj\x01", "an Avro file"),
    (b"ORC", "an ORC file"), (b"FEA1", "a Feather file, version 1"),
    (b"\x7fELF", "a program"), (b"MZ\x90\x00", "a program"), (b"\xca\xfe\xba\xbe", "a program"),
    (b"OggS", "an Ogg file"), (b"ID3", "an MP3 file"), (b"fLaC", "a FLAC file"),
    (b"crc\x00", "a checksum of Hadoop"),
    (b"\xff\xfe", "UTF-16 text"), (b"\xfe\xff", "UTF-16 text"),
)  # fmt: skip
_SHORT_MAGIC = {b"BM", b"ORC", b"ID3", b"\x5d\x00\x00"}  # texts may begin so: NULs decide
_TEXT_CONTROLS = frozenset(b"\t\n\v\f\r\x1b\b")


@dataclass(frozen=True)
class FileType:
    """`packing`: to be unpacked first (None: plain). `what`: of binary files, in words."""

    kind: FileKind
    packing: Packing | None = None
    what: str = ""

    @property
    def name(self) -> str:
        """As a summary prints it: `JSON lines (gzip)`."""
        names = {"lines": "JSON lines", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow"}
        name = names.get(self.kind, self.what or self.kind)
        return f"{name} ({self.packing.name})" if self.packing else name


def detect_type(path: Path) -> FileType:
    """The type of a file. Raises DataError if it cannot be read or unpacked."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            packing = packing_of(head)
            if packing is None:
                kind, what = _kind_of(head, path.name)
                return FileType(kind, None, what)
            file.seek(0)
            head = b"".join(islice(unpacked(file, packing, HEAD), 1))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnpackError as error:
        raise DataError(
            f"{path}: cannot be unpacked: {error}; fetch it again, or leave it out with --exclude"
        ) from None
    kind, what = _kind_of(head, _unpacked_name(path))
    if packing_of(head):
        kind, what = "binary", "packed twice"
    return FileType(kind, packing, what)


def _unpacked_name(path: Path) -> str:
    """`a.jsonl` of `a.jsonl.gz`."""
    known = path.suffix.lower() in {".gz", ".gzip", ".xz", ".zst", ".zstd", ".bz2", ".dz"}
    return path.stem if known else path.name


def _kind_of(head: bytes, name: str) -> tuple[FileKind, str]:
    """The kind of unpacked contents, and what they are if binary."""
    for magic, kind in _TABLES:
        if head.startswith(magic):
            return kind, ""
    if what := _binary(head):
        return "binary", what
    return _SUFFIXES.get(PurePosixPath(name).suffix.lower(), "text"), ""


def _binary(head: bytes) -> str:
    """What the contents are if they are no text; else ""."""
    counts = Counter(head)
    with_nul = counts[0] * 1000 >= len(head) > 0
    for magic, what in _BINARY:
        if head.startswith(magic) and (with_nul or magic not in _SHORT_MAGIC):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI ")):
        return "an image, sound or film"
    controls = sum(counts[byte] for byte in range(32) if byte not in _TEXT_CONTROLS)
    if with_nul or controls * 20 > len(head):
        return "binary"
    return ""
