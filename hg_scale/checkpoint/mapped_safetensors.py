"""Read safetensors files through a memory map, after every number in their header was checked.

The format is that of `safetensors_file`. Imports no torch.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, RootModel

from hg_scale.bounded_read import (
    Count,
    FormatError,
    format_errors,
    open_regular,
    parse_json,
    validated,
)
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS, Array

_FP32_BYTES = 4
_MAX_HEADER = 100_000_000  # bytes, as in the library
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip
"""Bits per element of the dtypes of the format; others are left to the library."""


class TensorEntry(BaseModel):
    """A tensor in a header: `data_offsets` are its bytes (begin, end) after the header."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Count] = Field(max_length=64)
    data_offsets: tuple[Count, Count] = Field(strict=False)  # JSON has lists only


class _Header(RootModel[dict[str, TensorEntry]]):
    """The entries of a header by tensor."""


def parse_header(data: bytes | mmap.mmap) -> tuple[dict[str, TensorEntry], int]:
    """Return the header's entries by tensor name, and the byte at which the data begins.

    Every tensor has the length of its dtype and shape, and they fill the data without overlap.
    Raises FormatError if `data`, the contents of a file, has no such header.
    """
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length
    if len(data) < 8 or begin > len(data):
        raise FormatError("its header is longer than the file")
    if length > _MAX_HEADER:
        raise FormatError(f"its header has {length:,} bytes, at most {_MAX_HEADER:,} are expected")
    tree = parse_json(data[8:begin])
    if not isinstance(tree, dict):
        raise FormatError("its header is not a JSON object")
    tree.pop("__metadata__", None)
    parsed: _Header = validated(_Header, tree)
    _require_exact_cover(parsed.root, len(data) - begin)
    return parsed.root, begin


def _require_exact_cover(entries: dict[str, TensorEntry], size: int) -> None:
    """Raise FormatError unless the tensors follow each other and fill `size` bytes of data."""
    position, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        bits = DTYPE_BITS.get(entry.dtype)
        if bits is not None and 8 * (end - begin) != prod(entry.shape) * bits:
            expected = f"{prod(entry.shape) * bits // 8:,} bytes of {entry.dtype} {entry.shape}"
            raise FormatError(f"expected {expected}, found offsets {begin:,} to {end:,}", (name,))
        if begin != position:
            what = f"overlaps {previous}" if begin < position else "leaves a gap before it"
            raise FormatError(
                f"expected data from byte {position:,}, found {begin:,}: {what}", (name,)
            )
        position, previous = end, name
    if position != size:
        raise FormatError(f"its tensors have {position:,} bytes, the file {size:,}")


def map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, TensorEntry], int]:
    """Map a file into memory; return the map and `parse_header` of it. Raises CheckpointError."""
    with format_errors(path, CheckpointError, "; use another file"):
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise FormatError("it is too short for a header")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return content, *parse_header(content)


class MappedSafetensors:
    """A memory-mapped safetensors file of flat fp32 tensors; pages are read when accessed.

    Raises CheckpointError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map, self._entries, self._begin = map_safetensors(path)

    def require(self, lengths: Mapping[str, int]) -> None:
        """Raise CheckpointError unless the file has these tensors, of these lengths, only."""
        for name, length in lengths.items():
            self.offset(name, length)
        if unknown := sorted(self._entries.keys() - lengths.keys()):
            raise CheckpointError(f"{self._path}: {unknown[0]} is not in the manifest")

    def tensor(self, name: str, length: int) -> Array:
        """Return a view of a tensor of `length` elements. Raises as `offset` does."""
        return np.frombuffer(self._map, np.float32, length, self.offset(name, length))

    def offset(self, name: str, length: int) -> int:
        """Return the first byte of a tensor of `length` elements in the file.

        Raises CheckpointError if the file has no fp32 tensor of that name and length.
        """
        entry = self._entries.get(name)
        if entry is None or (entry.dtype, prod(entry.shape)) != ("F32", length):
            raise CheckpointError(
                f"{self._path}: has no {name} of {length} fp32 elements; use another checkpoint"
            )
        return self._begin + entry.data_offsets[0]

    def prefetch(self, begin: int, end: int) -> None:
        """Have the kernel read bytes [begin, end) in the background."""
        begin -= begin % mmap.PAGESIZE
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)


def header_problem(checkpoint: Path, file: Mapping[str, Any]) -> str | None:
    """Return why the header of a file, named first, is not that of its manifest entry, or None."""
    lengths = {
        f"{number}.{kind}": fragment["length"]
        for kind in KINDS
        for number, fragment in enumerate(file["fragments"])
    }
    try:
        MappedSafetensors(checkpoint / file["name"]).require(lengths)
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    return None
