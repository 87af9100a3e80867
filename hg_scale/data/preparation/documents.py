"""Read documents from plain text, JSON lines and parquet files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from heapq import merge
from itertools import count, groupby
from pathlib import Path
from typing import Any, Literal

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import batches
from hg_scale.data.preparation.batches import (
    PositionedBatch,
    document_too_long,
    group_documents,
    separated_batches,
)
from hg_scale.data.preparation.sources import Advance, is_compressed, read_blocks, uncompressed_name

FileKind = Literal["text", "lines", "parquet"]

PIECE_BYTES = 1 << 16  # of a piece of a text without documents
_CUT_RANGE = 1 << 12  # bytes in front of the end of a piece in which it may be cut
_scan_json = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
LastCut = Callable[[bytes, int, int], int | None]  # as `Tokenizer.last_cut`
_SUFFIXES: dict[str, FileKind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "parquet",
}  # fmt: skip


def file_kind(path: Path) -> FileKind:
    """Return the format of a file, by its name without .gz, .xz or .zst."""
    return _SUFFIXES.get(Path(uncompressed_name(path)).suffix.lower(), "text")


@dataclass(frozen=True)
class TextFormat:
    """Where documents begin and end in files."""

    field: str = "text"  # of JSON lines and parquet
    separator: bytes | None = None  # in plain text; None: a file is a document

    def documents(
        self, path: Path, begin: int, end: int, scratch: Path, advance: Advance
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (position, text) of the documents whose first stored byte is in [begin, end).

        A file that cannot be split is read from start to end. `scratch` is a folder for temporary
        files. Raises DataError, naming the file.
        """
        match file_kind(path):
            case "lines":
                return read_lines(path, self.field, begin, end, advance)
            case "parquet":
                return read_parquet(path, self.field, begin, end, scratch, advance)
        if self.separator is not None:
            return read_separated(path, self.separator, begin, end, advance)
        return read_single(path, advance)

    def batches(
        self, path: Path, begin: int, end: int, scratch: Path, advance: Advance
    ) -> Iterator[PositionedBatch]:
        """Yield the same documents in batches, some of them empty."""
        if file_kind(path) == "text" and self.separator is not None:
            return separated_batches(path, self.separator, begin, end, advance)
        return group_documents(self.documents(path, begin, end, scratch, advance))

    def can_split(self, path: Path) -> bool:
        """Return whether a part of the file can be read without the bytes before it."""
        if is_compressed(path):
            return False
        if file_kind(path) != "text":
            return True
        # Matches of a separator that overlaps itself depend on where the search starts.
        text = self.separator
        return text is not None and not any(
            text.startswith(text[cut:]) for cut in range(1, len(text))
        )


def read_single(path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Yield a file as one document, at position 0."""
    blocks, size = [], 0
    for block in read_blocks(path, advance=advance):
        blocks.append(block)
        size += len(block)
        if size > batches.MAX_DOCUMENT_BYTES:
            raise document_too_long(path, 0)
    yield 0, b"".join(blocks)


def read_separated(
    path: Path, separator: bytes, begin: int, end: int, advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the texts between separators that begin in [begin, end)."""
    for positions, batch in separated_batches(path, separator, begin, end, advance):
        for position, text in zip(positions.tolist(), batch.documents(), strict=True):
            yield position, bytes(text)


def read_lines(
    path: Path, field: str, begin: int, end: int, advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Yield (position, text) of the JSON lines that begin in [begin, end)."""
    for position, line in read_separated(path, b"\n", begin, end, advance):
        if not line or line.isspace():
            continue
        try:
            record = _parse_line(line)
            text = record[field]
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: the line at byte {position} is not JSON ({error}); expected an object "
                "per line: fix or remove it"
            ) from None
        except TypeError:
            raise DataError(
                f"{path}: the line at byte {position} is a {type(record).__name__}; expected an "
                "object per line: write each document into a line of its own"
            ) from None
        except KeyError:
            raise DataError(
                f"{path}: the line at byte {position} has no field {field!r} (it has: "
                f"{', '.join(record)}); set --field to the field that holds the text"
            ) from None
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"{path}: the field {field!r} of the line at byte {position} is a "
                f"{type(text).__name__}, not text; set --field to another"
            )
        yield position, text.encode("utf-8", "surrogatepass")


def _parse_line(line: bytes) -> Any:
    """Return `json.loads(line)`, without what that does in front of and behind an object."""
    if line.startswith(b'{"'):  # so it is UTF-8
        with suppress(ValueError, StopIteration):
            text = line.decode()
            record, end = _scan_json(text, 0)
            if end == len(text):
                return record
    return json.loads(line)


def read_parquet(
    path: Path, field: str, begin: int, end: int, scratch: Path, advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, text) of the row groups whose first stored byte is in [begin, end).

    A compressed file is decompressed into `scratch` first.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with ExitStack() as stack:
            source: Any = path
            if is_compressed(path):
                source = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                for block in read_blocks(path, advance=advance):
                    source.write(block)
                source.seek(0)
            file = stack.enter_context(parquet.ParquetFile(source))
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(
                    f"{path}: has no column {field!r} (it has: {', '.join(schema.names)}); set "
                    "--field to the column that holds the text"
                )
            row = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                first = row
                row += group.num_rows
                if not is_compressed(path) and not begin <= _group_offset(group) < end:
                    continue
                for batch in file.iter_batches(1024, row_groups=[number], columns=[field]):
                    texts = _as_bytes(batch.column(0), path, field)
                    for number_in_file, text in enumerate(texts, first):
                        if text is not None:
                            yield number_in_file, text
                    first += len(texts)
                if not is_compressed(path):
                    advance(sum(group.column(c).total_compressed_size
                                for c in range(group.num_columns)))  # fmt: skip
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as parquet ({reason}); download it again, or leave it out "
            "with --exclude"
        ) from None


def _group_offset(group: Any) -> int:
    column = group.column(0)
    return min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)


def _as_bytes(column: Any, path: Path, field: str) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    elif not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise DataError(f"{path}: the column {field!r} holds {kind}, not text; set --field to "
                        "another")  # fmt: skip
    return column.to_pylist()


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
