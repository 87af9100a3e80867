"""Read a column of text from Parquet, Arrow, CSV and TSV files.

Rows where the text is null are no documents; a remark counts them. Positions are row numbers, which
count all rows.
"""

from __future__ import annotations

import codecs
import csv
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.skipping import STOP, PartError, SkipLog
from hg_scale.data.preparation.sources import Advance, is_compressed, read_blocks

if TYPE_CHECKING:
    import pyarrow

Documents = Iterator[tuple[int, bytes]]

NULLS = "rows or lines left out: their text is null"  # a remark, after the number

_ROWS = 1024  # rows of Parquet in memory
_MAX_FIELD_BYTES = 1 << 30  # of CSV; a document has to fit into memory


def nested_path(field: str, names: Callable[[Sequence[str]], Sequence[str] | None]) -> list[str]:
    """Return the names that lead to a field written with dots; a literal name with a dot wins.

    `names(path)` are the names inside what `path` leads to, None where it has no names. Returns an
    empty list where there is no such field.
    """

    def search(path: list[str], rest: str) -> list[str]:
        inside = names(path)
        if inside is None:
            return []
        if rest in inside:
            return [*path, rest]
        parts = rest.split(".")
        for count in range(len(parts) - 1, 0, -1):  # the longest name first
            name, below = ".".join(parts[:count]), ".".join(parts[count:])
            if name in inside and (found := search([*path, name], below)):
                return found
        return []

    return search([], field)


def read_parquet(
    path: Path,
    field: str,
    begin: int,
    end: int,
    scratch: Path,
    advance: Advance,
    log: SkipLog = STOP,
) -> Documents:
    """Yield (row number, text) of the row groups whose first stored byte is in [begin, end).

    A compressed file is decompressed into `scratch` first. Raises DataError.
    """
    from pyarrow import parquet

    compressed = is_compressed(path)
    with _arrow_errors(path, "Parquet"), ExitStack() as stack:
        source = stack.enter_context(_seekable(path, scratch, advance)) if compressed else path
        file = stack.enter_context(parquet.ParquetFile(source))
        names = _column_path(file.schema_arrow, path, field)
        row = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            first = row
            row += group.num_rows
            if not compressed and not begin <= _group_offset(group) < end:
                continue
            selected = {"row_groups": [number], "columns": [".".join(names)]}
            with _arrow_errors(path, "Parquet", PartError):
                for batch in file.iter_batches(_ROWS, **selected):
                    yield from _documents(batch, names, path, field, first, log)
                    first += batch.num_rows
            if not compressed:
                advance(sum(group.column(c).total_compressed_size
                            for c in range(group.num_columns)))  # fmt: skip


def _group_offset(group: Any) -> int:
    column = group.column(0)
    return min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)


def read_arrow(
    path: Path,
    field: str,
    scratch: Path,
    advance: Advance,
    log: SkipLog = STOP,
    *,
    stream: bool,
) -> Documents:
    """Yield (row number, text) of an Arrow IPC file or stream. Raises DataError.

    A compressed file is decompressed into `scratch` first.
    """
    from pyarrow import ipc

    with _arrow_errors(path, "Arrow"), _seekable(path, scratch, advance) as source:
        reader = ipc.open_stream(source) if stream else ipc.open_file(source)
        names = _column_path(reader.schema, path, field)
        first = 0
        batches = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            batch.validate()
            yield from _documents(batch, names, path, field, first, log)
            first += batch.num_rows


@contextmanager
def _seekable(path: Path, scratch: Path, advance: Advance) -> Iterator[Any]:
    """Open a file, or its decompressed contents in a temporary file."""
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        advance(path.stat().st_size)
        return
    with tempfile.TemporaryFile(dir=scratch) as unpacked:
        for block in read_blocks(path, advance=advance):
            unpacked.write(block)
        unpacked.seek(0)
        yield unpacked


@contextmanager
def _arrow_errors(path: Path, kind: str, error_type: type[DataError] = DataError) -> Iterator[None]:
    """Turn the errors of pyarrow into a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise error_type(
            f"{path}: cannot be read as {kind} ({reason}); download it again, or leave it out "
            "with --exclude"
        ) from None


def _column_path(schema: pyarrow.Schema, path: Path, field: str) -> list[str]:
    """Return the names that lead to the column `field`. Raises DataError."""
    import pyarrow

    def names(parents: Sequence[str]) -> list[str] | None:
        if not parents:
            return schema.names
        kind = schema.field(parents[0]).type
        for name in parents[1:]:
            kind = kind.field(name).type
        return [f.name for f in kind] if pyarrow.types.is_struct(kind) else None

    if not (found := nested_path(field, names)):
        raise DataError(
            f"{path}: has no column {field!r} (it has: {', '.join(schema.names)}); set "
            "--field to the column that holds the text"
        )
    if schema.names.count(found[0]) > 1:
        raise DataError(f"{path}: has several columns {found[0]!r}; rename them")
    return found


def _documents(
    batch: pyarrow.RecordBatch,
    names: Sequence[str],
    path: Path,
    field: str,
    first: int,
    log: SkipLog,
) -> Documents:
    """Yield (row number, text) of the rows of a batch, the first of which is number `first`."""
    from pyarrow import compute

    column = batch.column(batch.schema.get_field_index(names[0]))
    if len(names) > 1:
        column = compute.struct_field(column, list(names[1:]))
    texts = text_values(column, path, field)
    if nulls := texts.count(None):
        log.remarks[NULLS] += nulls
    for number, text in enumerate(texts, first):
        if text is not None:
            yield number, text


def text_values(column: Any, path: Path, field: str) -> list[bytes | None]:
    """Return the texts of an Arrow array: of strings or bytes in any layout, or of nulls only.

    Raises DataError for any other type, naming the file, the column and the type.
    """
    import pyarrow
    from pyarrow import compute, types

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if types.is_run_end_encoded(column.type):
        column = compute.run_end_decode(column)
    if types.is_dictionary(column.type):
        column.validate(full=True)  # indices out of range would read foreign memory
        column = column.dictionary_decode()
    kind = column.type
    if types.is_null(kind):
        return [None] * len(column)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    if not (is_text or is_bytes or types.is_fixed_size_binary(kind)):
        raise DataError(f"{path}: the column {field!r} holds {kind}, not text; set --field to "
                        "another")  # fmt: skip
    column = column.cast(pyarrow.large_binary())  # also where the bytes are no UTF-8
    column.validate(full=True)
    return column.to_pylist()


def read_csv(
    path: Path, field: str, delimiter: str, advance: Advance, log: SkipLog = STOP
) -> Documents:
    """Yield (row number, text) of a CSV file with a header, fields quoted as in RFC 4180.

    Row by row: Python's reader takes fields of any length and keeps every byte, valid UTF-8 or not.
    Rows with another number of fields go to `log`. Raises DataError.
    """
    csv.field_size_limit(_MAX_FIELD_BYTES)
    lines = _CsvLines(path, advance)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        column = _csv_column(header, path, field)
        number, position = 0, lines.position
        for row in rows:
            if row and len(row) != len(header):
                log.skip(path, "line", position,
                    f"{path}: the row that ends in line {rows.line_num} has {len(row)} fields, the "
                    f"header {len(header)}; quote fields that contain {delimiter!r} or line breaks"
                )  # fmt: skip
            elif row:  # no empty line
                yield number, row[column].encode("utf-8", "surrogateescape")
            number, position = number + bool(row), lines.position
    except csv.Error as error:
        raise DataError(
            f"{path}: line {rows.line_num} cannot be read as CSV ({error}); quote its fields as in "
            "RFC 4180, or convert the file to JSON lines"
        ) from None


def _csv_column(header: list[str], path: Path, field: str) -> int:
    if header.count(field) == 1:
        return header.index(field)
    problem = "several columns" if field in header else "no column"
    raise DataError(
        f"{path}: has {problem} {field!r} (it has: {', '.join(map(_shown, header))}); set "
        "--field to the column that holds the text"
    )


class _CsvLines:
    """The lines of a text with their ends, without a byte order mark."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._lines = _lines(read_blocks(path, advance=advance))
        self.position = 0  # bytes of the lines so far

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        text = line if self.position else line.removeprefix(codecs.BOM_UTF8)
        self.position += len(line)
        return text.decode("utf-8", "surrogateescape")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        begin = 0
        while (end := block.find(b"\n", begin) + 1) > 0:
            yield b"".join(pending) + block[begin:end]
            pending, begin = [], end
        pending.append(block[begin:])
    if any(pending):
        yield b"".join(pending)


def _shown(name: str) -> str:
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text if len(text) <= 40 else f"{text[:40]}..."
