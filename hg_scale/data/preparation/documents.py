"""Read documents from plain text, JSON lines and parquet files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.skipping import STOP, PartError, SkipLog
from hg_scale.data.preparation.sources import Advance, is_compressed, read_blocks, uncompressed_name

FileKind = Literal["text", "lines", "parquet"]

MAX_DOCUMENT_BYTES = 1 << 30  # a document has to fit into memory
PIECE_BYTES = 1 << 16  # of a piece of a text without documents
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
        match file_kind(path):
            case "lines":
                return read_lines(path, self.field, begin, end, advance, log)
            case "parquet":
                return read_parquet(path, self.field, begin, end, scratch, advance)
        if self.separator is not None:
            return read_separated(path, self.separator, begin, end, advance, log)
        return read_single(path, advance)

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
        if text is not None:
            yield position, text


def _text_of_line(path: Path, position: int, line: bytes, field: str) -> bytes | None:
    """Return the text of a JSON line, None where the field is null. Raises DataError."""
    try:
        record = json.loads(line)
        text = record[field]
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the line at byte {position} is not JSON ({error}); expected an object "
            "per line: fix or remove it"
        ) from None
    except (TypeError, IndexError):
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
        return None
    if not isinstance(text, str):
        raise DataError(
            f"{path}: the field {field!r} of the line at byte {position} is a "
            f"{type(text).__name__}, not text; set --field to another"
        )
    return text.encode("utf-8", "surrogatepass")


def read_parquet(
    path: Path, field: str, begin: int, end: int, scratch: Path, advance: Advance
) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, text) of the row groups whose first stored byte is in [begin, end).

    A compressed file is decompressed into `scratch` first.
    """
    import pyarrow
    from pyarrow import parquet

    kind = DataError
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
            row, kind = 0, PartError
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
        raise kind(
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
