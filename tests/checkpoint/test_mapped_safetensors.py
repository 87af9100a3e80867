"""Headers of safetensors files: tensors fill the data exactly, once, in their dtype and shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hg_scale.bounded_read import FormatError
from hg_scale.checkpoint.mapped_safetensors import parse_header

HEADER = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]},
}


def content(header: Any, size: int = 12) -> bytes:
    """Return a file with this header and `size` bytes of data."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + bytes(size)


def test_valid_header_is_parsed() -> None:
    entries, begin = parse_header(content({"__metadata__": {"format": "pt"}, **HEADER}))
    assert len(content({"__metadata__": {"format": "pt"}, **HEADER})) - begin == 12
    assert [entry.data_offsets for entry in entries.values()] == [(0, 8), (8, 12)]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"b": {**HEADER["b"], "data_offsets": [0, 4]}}, 12, "a: .*: overlaps b"),
        ({"b": {**HEADER["b"], "data_offsets": [7, 11]}}, 12, "b: .*: overlaps a"),
        (
            {"b": {**HEADER["b"], "data_offsets": [9, 13]}},
            13,
            "b: expected data from byte 8, found 9: leaves a gap",
        ),
        ({"b": {**HEADER["b"], "data_offsets": [8, 13]}}, 13, r"b: expected 4 bytes of BF16"),
        ({"b": {**HEADER["b"], "data_offsets": [12, 8]}}, 12, "b: expected 4 bytes"),
        ({"b": {**HEADER["b"], "shape": [3]}}, 12, "b: expected 6 bytes"),
        ({"b": {**HEADER["b"], "shape": [-2]}}, 12, r"b.shape\[0\]: expected greater"),
        ({"b": {**HEADER["b"], "data_offsets": ["8", "12"]}}, 12, r"b.data_offsets\[0\]"),
        ({"b": 5}, 12, "b: expected .* found 5"),
        ({}, 16, "its tensors have 12 bytes, the file 16"),
        ({}, 11, "its tensors have 12 bytes, the file 11"),
    ],
)
def test_impossible_tensors_are_named(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_header(content({**HEADER, **changes}, size))


@pytest.mark.parametrize("header", [b"[1, 2]", b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff"])
def test_header_that_is_no_object_is_refused(header: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(content(header))
    with pytest.raises(FormatError, match="longer than the file"):
        parse_header((2**63).to_bytes(8, "little") + b"{}")
