"""Read files that may hold anything: regular, of bounded size and depth, and of declared types.

Every file that this project reads goes through here, and what does not fit is one line. The errors
name no path: callers add it, with what to do, in an error of their own.

    record = validated(HeartbeatRecord, read_json(path, RECORD_BYTES))
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

_T = TypeVar("_T")

RECORD_BYTES = 1 << 20  # a line of JSON: heartbeats, owners, ends, lines of metrics.jsonl
TEXT_BYTES = 1 << 24  # written by hand: configurations, config.json of an export
TABLE_BYTES = 1 << 30  # grows with ranks or shards: manifests, indexes, headers
BINARY_BYTES = 1 << 30  # read into memory as it is: tokenizer models

MAX_DEPTH = 64  # of nested objects and lists; far below the limit of Python's stack
MAX_ITEMS = 1_000_000  # of a tree that was not read from a file of bounded size
MAX_DIGITS = 20  # those of the largest unsigned 64-bit integer
# NUL, which no file name may contain, and lone UTF-16 surrogates, which cannot be encoded.
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))

JsonPath = tuple[str | int, ...]  # keys and list indices that lead to a value

_PART = 1 << 20  # bytes read at a time


class SupportsRead(Protocol):
    """A file or another source of bytes."""

    def read(self, size: int, /) -> bytes: ...


Count = Annotated[int, Field(ge=0, lt=1 << 62)]
"""A number of steps, tokens, bytes or elements."""


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("expected the name of a file in the same folder")
    return name


FileName = Annotated[str, Field(max_length=255), AfterValidator(_plain_name)]
"""The name of a file in the folder of the file that names it: no path leads out of it."""


class FormatError(ValueError):
    """Content that does not fit: where in the file, what was expected and what was found."""

    def __init__(self, message: str, location: JsonPath = ()) -> None:
        self.message, self.location = message, location
        where = format_location(location)
        super().__init__(f"{where}: {message}" if where else message)


class NotJson(FormatError):
    """Text that is no JSON at all."""


def format_location(location: JsonPath) -> str:
    """Return the keys and indices that lead to a value as `files[0].name`, cut to fit on a line."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    text = "".join(parts).removeprefix(".")
    return text if len(text) <= 200 else f"{text[:196]} ..."


def show_value(value: Any) -> str:
    """Describe a value that was found, in at most 60 characters of one line."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge integer"
    text = json.dumps(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:56]} ..."


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading. Raises OSError, and FormatError if it is no regular file.

    Opening a named pipe would else wait for a writer, for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular_mode(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path) -> None:
    """Raise OSError, or FormatError if `path` is no regular file: before a library opens it."""
    _require_regular_mode(path.stat().st_mode)


def _require_regular_mode(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "a device")
        raise FormatError(f"expected a regular file, found {kind}")


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, and FormatError past `limit` bytes."""
    with open_regular(path) as file:
        return read_stream(file, limit)


def read_stream(file: SupportsRead, limit: int) -> bytes:
    """Return all that can be read, in memory for its size. Raises FormatError past `limit`."""
    parts, size = [], 0
    while part := file.read(_PART):  # reading `limit` at once would take memory for it
        parts.append(part)
        size += len(part)
        if size > limit:
            raise FormatError(f"expected at most {limit:,} bytes, found more")
    return b"".join(parts)


def read_text(path: Path, limit: int) -> str:
    """Return the content of a file in UTF-8. Raises as `read_bounded`."""
    return _decode(read_bounded(path, limit))


def read_json(path: Path, limit: int) -> Any:
    """Return the value in a JSON file. Raises OSError and FormatError."""
    return parse_json(read_bounded(path, limit))


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError and FormatError."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object, found {show_value(value)}")
    return value


def parse_json(data: bytes | str, location: JsonPath = (), finite: bool = True) -> Any:
    """Parse JSON, which is the value at `location`, more strictly than Python does.

    Refused are duplicate keys, deep nesting, long integers, NUL, lone surrogates and, with
    `finite`, NaN and infinity. Raises FormatError.
    """
    text = data if isinstance(data, str) else _decode(data)
    try:
        if not (location or _SUSPICIOUS.search(text)):
            with suppress(_DuplicateKey):
                value = json.loads(text, object_pairs_hook=_unique)
                if _is_shallow(value):
                    return value
        value = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer)
    except RecursionError:
        raise _too_deep(location) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"not JSON at {where}: {error.msg}", location) from None
    return require_plain(value, location, finite)


# In a text without any of these, no string or number is one that `require_plain` refuses.
_SUSPICIOUS = re.compile(
    "[\0\ud800-\udfff]|" + r"\\u(?:0000|[dD][89a-fA-F])|NaN|Infinity|[eE]\+?\d{3}|\d{20}"
)


class _DuplicateKey(Exception):
    """An object has a key twice: `require_plain` finds where."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise _DuplicateKey
    return tree


def as_json(value: Any, location: JsonPath = ()) -> Any:
    """Return a value that was not read from JSON as if it had been: bounded, without tuples.

    It may hold itself, or one object many times. Raises FormatError.
    """
    level, total = [value], 0
    for _ in range(MAX_DEPTH):
        inner = (
            item
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        )
        level = list(islice(inner, MAX_ITEMS))
        total += len(level)
        if total >= MAX_ITEMS:
            raise FormatError(f"expected less than {MAX_ITEMS:,} values", location)
        if not level:
            break
    else:
        raise _too_deep(location)
    try:
        return parse_json(json.dumps(value, allow_nan=False), location)
    except (TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"expected plain values: {error}", location) from None


def _is_shallow(value: Any) -> bool:
    """Return whether objects and lists nest no deeper than MAX_DEPTH."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return True
    return False


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]} at {error.start:,}"
        raise FormatError(f"expected UTF-8, found {where}") from None


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object: a dict would silently keep the last of duplicate keys."""


class _LongInteger(str):
    """The digits of an integer that is too long."""


def _integer(text: str) -> int | _LongInteger:
    return int(text) if len(text.lstrip("-")) <= MAX_DIGITS else _LongInteger(text)


def require_plain(value: Any, location: JsonPath = (), finite: bool = True) -> Any:
    """Return the value at `location`, dicts for objects, or raise FormatError where unsupported."""
    if len(location) > MAX_DEPTH:
        raise _too_deep(location)
    if isinstance(value, _LongInteger):
        raise FormatError(
            f"an integer of {len(value)} digits; at most {MAX_DIGITS} are allowed", location
        )
    if isinstance(value, str) and _INVALID_TEXT.search(value):
        raise FormatError(f"NUL or a lone surrogate in {json.dumps(value)}", location)
    if isinstance(value, float) and finite and not isfinite(value):
        raise FormatError(f"expected a finite number, found {value}", location)
    if isinstance(value, _Pairs):
        tree: dict[str, Any] = {}
        for key, inner in value:
            require_plain(key, location)
            if key in tree:
                raise FormatError(
                    "appears twice in one object; remove one of the two", (*location, key)
                )
            tree[key] = require_plain(inner, (*location, key), finite)
        return tree
    if isinstance(value, list):
        return [require_plain(entry, (*location, i), finite) for i, entry in enumerate(value)]
    return value


def _too_deep(location: JsonPath) -> FormatError:
    return FormatError(
        f"objects or lists nest too deep; at most {MAX_DEPTH} are allowed", location[:4]
    )


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validated(kind: type[_T] | Any, value: Any, location: JsonPath = ()) -> _T:
    """Return `value` as a `kind`: a pydantic model, a dataclass or any type that pydantic checks.

    Raises FormatError naming the first key that does not fit.
    """
    adapter: TypeAdapter[_T] = _adapter(kind)  # type: ignore[arg-type]
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "expected").replace(
            "Field required", "missing"
        )
        found = "" if first["type"] == "missing" else f", found {show_value(first['input'])}"
        raise FormatError(message + found, (*location, *first["loc"])) from None


@contextmanager
def format_errors(path: Path, error: type[Exception], advice: str = "") -> Iterator[None]:
    """Raise FormatError and OSError of the block as `error` in one line that names `path`."""
    try:
        yield
    except FormatError as problem:
        what = "" if problem.location else "cannot be read: "
        raise error(f"{path}: {what}{problem}{advice}") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}{advice}") from None


_Number = bool | Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | float | None
_RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(
    dict[str, _Number | str | dict[str, Any] | list[Any]],
    config=ConfigDict(strict=True, allow_inf_nan=False),
)


def _without_nan(record: Any) -> Any:
    """Return an object with null for NaN and infinity, which other programs write as numbers."""
    if not isinstance(record, dict):
        return record
    floats = [key for key, value in record.items() if type(value) is float and not isfinite(value)]
    return {**record, **dict.fromkeys(floats)} if floats else record


def parse_record(line: bytes | str, kind: Any = None) -> dict[str, Any] | None:
    """Return the object in a line of a log of records; None if it is partial or holds none.

    `step`, where a record has one, is a count, and `time` a number; NaN and infinity become None,
    a `time` of None is left out. `kind`: a TypedDict of further keys with their types; a record
    that does not fit is None, too.
    """
    if len(line) > RECORD_BYTES:
        return None
    try:
        record = _RECORD.validate_python(_without_nan(from_json(line)))
        if record.get("time", 0) is None:
            del record["time"]
        if kind is not None:
            record = _adapter(kind).validate_python(record)
    except ValueError:
        return None
    step, time = record.get("step", 0), record.get("time", 0)
    valid = type(step) is int and step >= 0 and type(time) in (int, float)
    return record if valid else None
