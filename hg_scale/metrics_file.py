"""Readers of `metrics.jsonl` whose cost does not grow with what they do not show.

A live or killed run may end in a partial line, and a full disk leaves some in the middle: lines
that are no JSON object are skipped. Imports no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any, BinaryIO, Required

from pydantic import ConfigDict
from typing_extensions import TypedDict  # that of typing lacks what pydantic needs before 3.12

from hg_scale.bounded_read import RECORD_BYTES, Count, FormatError, open_regular, parse_record

_BLOCK = 1 << 16
_BATCH = 1024  # lines that are read together
MAX_LINE = RECORD_BYTES  # a longer line is no record
_MAX_TAIL = 1 << 26  # bytes that are searched for the newest validation


class MetricsEntry(TypedDict, total=False):
    """The keys of a line of metrics.jsonl that `read_recent` promises; a line may have others."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    step: Required[Count]
    start: Count
    job: str | int | None
    time: float
    loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    skipped_steps: Count
    validation_loss: float | None
    validation_bits_per_byte: float | None


def lines_backwards(path: Path, block: int = _BLOCK, limit: int | None = None) -> Iterator[bytes]:
    """Yield the lines from the last to the first, reading `block` bytes at a time from the end.

    limit: bytes to read at most; the line at which it ends is left out. Lines longer than MAX_LINE
    are skipped. Nothing if there is no such file.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        position = file.seek(0, 2)
        first = 0 if limit is None else max(0, position - limit)
        pieces: list[bytes] = []  # of the line that continues in the block before, last first
        length = 0
        while position > first:
            start = max(first, position - block)
            file.seek(start)
            head, *lines = file.read(position - start).split(b"\n")
            position = start
            if lines:
                lines[-1] += b"".join(reversed(pieces))
                yield from (line for line in reversed(lines) if 0 < len(line) <= MAX_LINE)
                pieces, length = [], 0
            length += len(head)
            pieces = [*pieces, head] if length <= MAX_LINE else [bytes(MAX_LINE + 1)]
        line = b"".join(reversed(pieces))
        if first == 0 and 0 < len(line) <= MAX_LINE:
            yield line


def read_recent(path: Path, count: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the last `count` records of steps, oldest first, and that of the last validation.

    Records that are no `MetricsEntry` are skipped.
    Reads the end of the file only: for the validation at most 64 MiB of it.
    """
    steps: list[dict[str, Any]] = []
    validation: dict[str, Any] | None = None
    for line in lines_backwards(path, limit=_MAX_TAIL):
        if len(steps) >= count and b'"validation_loss"' not in line:
            continue
        record = step_record(line, MetricsEntry)
        if record is None:
            continue
        if validation is None and "validation_loss" in record:
            validation = record
        elif "loss" in record and len(steps) < count:
            steps.append(record)
        if validation and len(steps) >= count:
            break
    return steps[::-1], validation


def step_record(line: bytes, kind: Any = None) -> dict[str, Any] | None:
    """Return the record of a line; None if it is not a JSON object with an integer `step`.

    `kind` as in `parse_record`.
    """
    record = parse_record(line, kind)
    return record if record is not None and "step" in record else None


class Columns:
    """Numbers of records by key, 8 bytes each: NaN where a record lacks a key or it is null."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._values = {key: array("d") for key in keys}

    def __len__(self) -> int:
        return len(next(iter(self._values.values()), ()))

    def extend(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records."""
        for key, values in self._values.items():
            new = [record.get(key, nan) for record in records]
            try:
                values.extend(array("d", new))
            except (TypeError, OverflowError):  # null, text, or an integer beyond float64
                values.extend(map(_number, new))

    def __getitem__(self, key: str) -> array[float]:
        return self._values[key]

    def items(self) -> Iterator[tuple[str, array[float]]]:
        """Yield each key and its column."""
        yield from self._values.items()


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        return nan
    try:
        return float(value)
    except OverflowError:
        return nan


def read_columns(
    path: Path,
    kinds: dict[str, Sequence[str]],
    error: Callable[[OSError], Exception],
) -> dict[str, Columns]:
    """Read the columns of each kind of record: `kinds` maps the key that marks it to its columns.

    Some lines at a time. Empty columns if there is no such file; raises `error(cause)` if it cannot
    be read.
    """
    columns = {kind: Columns(keys) for kind, keys in kinds.items()}
    try:
        with open_regular(path) as file:
            while records := _read_batch(file):
                for kind, table in columns.items():
                    table.extend([r for r in records if r is not None and kind in r])
    except FileNotFoundError:
        pass
    except OSError as cause:
        raise error(cause) from None
    except FormatError as cause:
        raise error(OSError(0, str(cause), str(path))) from None
    return columns


def _read_batch(file: BinaryIO) -> list[dict[str, Any] | None]:
    """Read up to _BATCH lines, None for what is no record; empty at the end of the file."""
    lines: list[bytes] = []
    while len(lines) < _BATCH and (line := file.readline(MAX_LINE + 1)):
        lines.append(line if len(line) <= MAX_LINE else b"")
    return [step_record(line) for line in lines]
