"""Read documents from files of every format; plain text and JSON lines are read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import merge
from itertools import count, groupby
from pathlib import Path
from typing import Any

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import batches
from hg_scale.data.preparation.batches import (
    PositionedBatch,
    document_too_long,
    group_documents,
    separated_batches,
)
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

PIECE_BYTES = 1 << 16  # of a piece of a text without documents
_CUT_RANGE = 1 << 12  # bytes in front of the end of a piece in which it may be cut
_JSON = json.JSONDecoder()
LastCut = Callable[[bytes, int, int], int | None]  # as `Tokenizer.last_cut`


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

    def batches(
        self,
        path: Path,
        begin: int,
        end: int,
        scratch: Path,
        advance: Advance,
        log: SkipLog = STOP,
    ) -> Iterator[PositionedBatch]:
        """Yield the same documents in batches, some of them empty."""
        if not self.as_they_are and self.separator is not None and format_of(path) == "text":
            return separated_batches(path, self.separator, begin, end, advance, log)
        return group_documents(self.documents(path, begin, end, scratch, advance, log))

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
        if size > batches.MAX_DOCUMENT_BYTES:
            raise document_too_long(path, 0)
    yield 0, b"".join(blocks)


def read_separated(
    path: Path, separator: bytes, begin: int, end: int, advance: Advance, log: SkipLog = STOP
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the texts between separators that begin in [begin, end).

    Texts that are too long go to `log`.
    """
    for positions, batch in separated_batches(path, separator, begin, end, advance, log):
        for position, text in zip(positions.tolist(), batch.documents(), strict=True):
            yield position, bytes(text)


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


def _parse_line(line: bytes) -> Any:
    """Return `json.loads(line)`, without what that does in front of and behind an object."""
    if line.startswith(b'{"'):  # so it is UTF-8
        with suppress(ValueError):
            text = line.decode()
            record, end = _JSON.raw_decode(text)
            if end == len(text):
                return record
    return json.loads(line)


def _text_of_line(path: Path, position: int, line: bytes, field: str) -> bytes | None:
    """Return the text of a JSON line, None where the field is null. Raises DataError."""
    try:
        record = _parse_line(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the line at byte {position} is not JSON ({error}); expected an object "
            "per line: fix or remove it"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: the line at byte {position} is {_json_kind(record)}; expected an "
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
            f"{path}: the field {field!r} of the line at byte {position} is "
            f"{_json_kind(text)}, not text; set --field to another"
        )
    return text.encode("utf-8", "surrogatepass")


def _json_kind(value: Any) -> str:
    """Return what a value is in the words of JSON."""
    if value is None:
        return "null"
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"), (int, "a number"), (float, "a number"), (str, "a string"),
        (list, "an array"), (dict, "an object"),
    ]  # fmt: skip
    return next(name for kind, name in kinds if isinstance(value, kind))


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
    path: Path,
    begin: int,
    end: int,
    bounds: Sequence[int],
    advance: Advance,
    last_cut: LastCut = lambda data, low, high: high,
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the pieces of a text that begin in [begin, end).

    A piece ends at each of `bounds`, and at each multiple of `PIECE_BYTES` or where `last_cut`
    moves it: up to 4 KiB to the front; where there is no cut, the piece continues. `begin` is a
    multiple; a piece belongs to the multiple or bound that began it, wherever its cut is.
    """
    stop = None if is_compressed(path) else end
    held, offset = b"", max(0, begin - _CUT_RANGE)  # text that was read, and its position
    blocks, ended = read_blocks(path, offset, advance), False
    position: int | None = None  # of the piece; None: none has begun yet
    multiples = count(begin, PIECE_BYTES)
    for mark, _ in groupby(merge(multiples, sorted(b for b in bounds if b > begin))):
        while not ended and offset + len(held) < mark + 2:
            block = next(blocks, b"")
            held, ended = held + block, not block
        if mark >= offset + len(held):
            break
        cut: int | None = mark
        if mark and mark not in bounds:
            low = max([mark - _CUT_RANGE, offset, *(b for b in bounds if b < mark)])
            cut = last_cut(held, low - offset, mark - offset)
            cut = None if cut is None else cut + offset
        if cut is not None and position is not None:
            yield position, held[position - offset : cut - offset]
        if stop is not None and mark >= stop and (cut is not None or position is None):
            return
        if cut is not None:
            held, offset, position = held[cut - offset :], cut, cut
    if position is not None and held:
        yield position, held
