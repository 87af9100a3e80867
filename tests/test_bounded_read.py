"""The bounded reader: what it refuses, where it says so, and that it does not wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.bounded_read import (
    MAX_DEPTH,
    FileName,
    FormatError,
    as_json,
    parse_json,
    parse_record,
    read_bounded,
    validated,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_ordinary_json_is_parsed_as_python_does(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert as_json(value) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [{"b": 1, "b": 2}]}', r"^a\[0\].b: appears twice"),
        ('{"a": NaN}', "^a: expected a finite number, found nan"),
        ('{"a": 1e999}', "^a: expected a finite number, found inf"),
        ('{"a": %s}' % ("1" * 5000), "^a: an integer of 5000 digits"),
        (r'{"a": "\u0000"}', "^a: NUL or a lone surrogate"),
        (r'{"a": ["\ud800"]}', r"^a\[0\]: NUL or a lone surrogate"),
        ("[" * 100_000, "nest too deep; at most 64"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nest too deep; at most 64"),
        ("{", "^not JSON at line 1, column 2"),
        (b"\xff", "^expected UTF-8, found byte 255 at 0"),
    ],
)
def test_hostile_json_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_json(text)


def test_values_that_hold_themselves_or_repeat_are_bounded() -> None:
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle
    with pytest.raises(FormatError, match="nest too deep"):
        as_json(cycle)
    wide: Any = 1
    for _ in range(6):
        wide = [wide] * 1000  # 10^18 values in a few kilobytes
    with pytest.raises(FormatError, match="less than 1,000,000 values"):
        as_json(wide)


def test_size_and_kind_of_a_file_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(FormatError, match="at most 4 bytes"):
        read_bounded(path, 4)
    with pytest.raises(FormatError, match="found a folder"):
        read_bounded(tmp_path, 4)
    with pytest.raises(FormatError, match="found a device"):
        read_bounded(Path(os.devnull), 4)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a\0b", "a\nb", "a\\b", 5, "a" * 256]
)
def test_names_that_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(FormatError):
        validated(FileName, name)


@pytest.mark.parametrize(
    ("line", "record"),
    [
        ('{"step": 3, "loss": null}', {"step": 3, "loss": None}),
        ('{"step": null}', None),
        ('{"step": "3"}', None),
        ('{"step": true}', None),
        ('{"step": -1}', None),
        ('{"step": 1, "time": "x"}', None),
        ('{"step": 1, "loss": NaN, "mfu": 1e999}', {"step": 1, "loss": None, "mfu": None}),
        ('{"step": 1, "requeued": true}', {"step": 1, "requeued": True}),
        ('{"step": 1, "time": NaN}', {"step": 1}),
        ('{"step": 1, "time": 10000000000000000000000}', {"step": 1, "time": 1e22}),
        ('{"step": 1, "tokens": %s}' % ("9" * 400), None),
        ('{"step": 1, "los', None),
        ("[1]", None),
        ("[" * 100_000, None),
    ],
)
def test_lines_without_a_number_are_no_records(line: str, record: Any) -> None:
    assert parse_record(line) == record
