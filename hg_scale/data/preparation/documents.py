"""Read documents from files of every format; plain text and JSON lines are read here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.file_format import format_of
from hg_scale.data.preparation.skipping import STOP, SkipLog
from hg_scale.data.preparation.sources import Advance, is_compressed, read_blocks
from hg_scale.data.preparation.tabular import (
    NULLS,
    nested_path,
    read_arrow,
    read_csv,
    read_parquet,
)

MAX_DOCUMENT_BYTES = 1 << 30  # a document has to fit into memory
PIECE_BYTES = 1 << 16  # of a piece of a text without documents


@dataclass(frozen=True)
class TextFormat:
    """Where documents begin and end in files."""

    field: str = "text"  # of JSON lines and tables; dots lead into nested fields
    separator: bytes | None = None  # in plain text; None: a file is a document
    as_they_are: bool = False  # the stored bytes of each file are a document, whatever they are

    def documents(
        self,
        path: Path,
        begin: int,
        end: int,
        scratch: Path,
        advance: Advance,
        log: SkipLog = STOP,
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (position, text) of the documents whose first stored byte is in [begin, end).

        A file that cannot be split is read from start to end. `scratch` is a folder for temporary
        files. Single documents that cannot be read go to `log`. Raises DataError, naming the file.
        """
        if self.as_they_are:
            return read_single(path, advance, as_it_is=True)
        match format_of(path):
            case "lines":
                return read_lines(path, self.field, begin, end, advance, log)
            case "parquet":
                return read_parquet(path, self.field, begin, end, scratch, advance, log)
            case "arrow file" | "arrow stream" as kind:
                stream = kind == "arrow stream"
                return read_arrow(path, self.field, scratch, advance, log, stream=stream)
            case "csv" | "tsv" as kind:
                return read_csv(path, self.field, "," if kind == "csv" else "\t", advance, log)
        if self.separator is not None:
            return read_separated(path, self.separator, begin, end, advance, log)
        return read_single(path, advance)

    def can_split(self, path: Path) -> bool:
        """Return whether a part of the file can be read without the bytes before it."""
        if self.as_they_are or is_compressed(path):
            return False
        if (kind := format_of(path)) != "text":
            return kind in ("lines", "parquet")
        # Matches of a separator that overlaps itself depend on where the search starts.
        text = self.separator
        return text is not None and not any(
            text.startswith(text[cut:]) for cut in range(1, len(text))
        )


def read_single(
    path: Path, advance: Advance, *, as_it_is: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield a file as one document, at position 0; `as_it_is`: without decompressing it."""
    blocks, size = [], 0
    for block in read_blocks(path, advance=advance, as_it_is=as_it_is):
        blocks.append(block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            raise _too_long(path, 0)
    yield 0, b"".join(blocks)


def read_separated(
    path: Path, separator: bytes, begin: int, end: int, advance: Advance, log: SkipLog = STOP
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the texts between separators that begin in [begin, end).

    Positions count bytes of the decompressed text; a compressed file is read from start to end.
    Texts that are too long go to `log`.
    """
    start = max(0, begin - len(separator))  # a text after a separator that ends at `begin` is ours
    position, skipping = start, begin > 0  # of the pending text; up to the first separator
    pending: list[bytes] = []
    held, tail = 0, b""  # bytes pending; the last bytes, in which a separator may begin
    stop = None if is_compressed(path) else end
    for block in read_blocks(path, start, advance):
        pending.append(block)
        held += len(block)
        seen = tail + block
        tail = seen[max(0, len(seen) - len(separator) + 1) :]
        if separator not in seen:
            if held > MAX_DOCUMENT_BYTES:
                if not skipping:  # else it began before `begin`, where it is reported
                    log.skip(path, "document", position, _too_long(path, position))
                position, pending, held = position + held, [], 0
                skipping = True
            continue
        texts = b"".join(pending).split(separator)
        rest = texts.pop()
        for text in texts:
            if skipping:
                skipping = False
            else:
                yield position, text
            position += len(text) + len(separator)
            if stop is not None and position >= stop:
                return
        pending, held, tail = [rest], len(rest), rest[max(0, len(rest) - len(separator) + 1) :]
    if held and not skipping:
        yield position, b"".join(pending)


def read_lines(
    path: Path, field: str, begin: int, end: int, advance: Advance, log: SkipLog = STOP
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the JSON lines that begin in [begin, end).

    Lines that cannot be used go to `log`.
    """
    for position, line in read_separated(path, b"\n", begin, end, advance, log):
        if not line or line.isspace():
            continue
        try:
            text = _text_of_line(path, position, line, field)
        except DataError as error:
            log.skip(path, "line", position, error)
            continue
        if text is None:
            log.remarks[NULLS] += 1
        else:
            yield position, text


def _text_of_line(path: Path, position: int, line: bytes, field: str) -> bytes | None:
    """Return the text of a JSON line, None where the field is null. Raises DataError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the line at byte {position} is not JSON ({error}); expected an object "
            "per line: fix or remove it"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: the line at byte {position} is a {type(record).__name__}; expected an "
            "object per line: write each document into a line of its own"
        )
    try:
        text = record[field] if field in record else nested_value(record, field)
    except KeyError:
        raise DataError(
            f"{path}: the line at byte {position} has no field {field!r} (it has: "
            f"{', '.join(record)}); set --field to the field that holds the text"
        ) from None
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(
            f"{path}: the field {field!r} of the line at byte {position} is a "
            f"{type(text).__name__}, not text; set --field to another"
        )
    return text.encode("utf-8", "surrogatepass")


def nested_value(record: dict[str, Any], field: str) -> Any:
    """Return the value of a field written with dots, None below a null. Raises KeyError."""
    below_null = False

    def names(path: Sequence[str]) -> list[str] | None:
        nonlocal below_null
        value: Any = record
        for name in path:
            value = value[name]
        below_null = below_null or value is None
        return list(value) if isinstance(value, dict) else None

    path = nested_path(field, names)
    if not path and not below_null:
        raise KeyError(field)
    value: Any = record if path else None
    for name in path:
        value = value[name]
    return value


def read_pieces(
    path: Path, begin: int, end: int, cuts: Sequence[int], advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the pieces of a text that begin in [begin, end).

    A piece ends at each multiple of `PIECE_BYTES` and at each of `cuts`. `begin` is a multiple.
    """
    position, pending = begin, b""
    stop = None if is_compressed(path) else end

    def next_cut() -> int:
        multiple = (position // PIECE_BYTES + 1) * PIECE_BYTES
        return min([cut for cut in cuts if position < cut < multiple], default=multiple)

    for block in read_blocks(path, begin, advance):
        pending += block
        while len(pending) >= (size := next_cut() - position):
            yield position, pending[:size]
            position, pending = position + size, pending[size:]
            if stop is not None and position >= stop:
                return
    if pending:
        yield position, pending


def _too_long(path: Path, position: int) -> DataError:
    return DataError(
        f"{path}: the document at byte {position} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; "
        "set --document-separator to what separates documents, or split a single text by position "
        "with --split in bytes"
    )
