"""Read and write safetensors files piece by piece; the library holds a file's tensors in memory.

A safetensors file is the length of its header (8 bytes, little-endian), a JSON header with dtype,
shape and byte offsets of each tensor, and the data. Here a file is created with its header and room
for the data, which several processes can fill at once, and read through a memory map.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import Array

DTYPES = {"fp32": ("F32", torch.float32, 4), "bf16": ("BF16", torch.bfloat16, 2)}
_FP32_BYTES = 4


def build_header(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: str = "fp32",
    metadata: dict[str, str] | None = None,
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the bytes before the data, and the (begin, end) of each tensor in the file in bytes.

    tensors: names and shapes, in the order of the data.
    """
    code, _, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    ranges, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + prod(shape) * size
        ranges[name] = begin, end
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    head = len(text).to_bytes(8, "little") + text
    return head, {name: (len(head) + a, len(head) + b) for name, (a, b) in ranges.items()}


def parse_header(data: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    """Return the header's entries by tensor name, and the byte at which the data begins.

    Raises ValueError if `data`, the contents of a file, has no such header.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > len(data):
        raise ValueError("its header is longer than the file")
    entries = json.loads(data[8:begin])
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    return entries, begin


@dataclass(frozen=True)
class TensorRegion:
    """Where a tensor is to be written: `offset` is its first byte in the file `path`."""

    path: Path
    offset: int
    dtype: str  # a key of DTYPES

    def write(self, start: int, elements: Tensor) -> None:
        """Write flat `elements` from the tensor's element `start` on. Raises OSError."""
        _, dtype, size = DTYPES[self.dtype]
        data = elements.to(dtype).contiguous().view(torch.uint8).numpy().data
        position = self.offset + start * size
        file = os.open(self.path, os.O_WRONLY)
        try:
            while data:
                written = os.pwrite(file, data, position)
                data, position = data[written:], position + written
        finally:
            os.close(file)


def create_safetensors(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str = "fp32"
) -> dict[str, TensorRegion]:
    """Create a file with its header and room for the tensors, which are zeros until written.

    tensors: names and shapes, in the order of the file. Raises OSError.
    """
    header, ranges = build_header(tensors, dtype, {"format": "pt"})
    with path.open("xb") as file:
        file.write(header)
        file.truncate(max((end for _, end in ranges.values()), default=len(header)))
    return {name: TensorRegion(path, begin, dtype) for name, (begin, _) in ranges.items()}


class MappedSafetensors:
    """A memory-mapped safetensors file of flat fp32 tensors; pages are read when accessed.

    Raises CheckpointError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._entries, self._begin = parse_header(self._map)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def tensor(self, name: str, length: int) -> Array:
        """Return a view of a tensor of `length` elements. Raises as `offset` does."""
        return np.frombuffer(self._map, np.float32, length, self.offset(name, length))

    def offset(self, name: str, length: int) -> int:
        """Return the first byte of a tensor of `length` elements in the file.

        Raises CheckpointError if the file has no fp32 tensor of that name and length.
        """
        try:
            entry = self._entries[name]
            begin, end = entry["data_offsets"]
            valid = entry["dtype"] == "F32" and end - begin == length * _FP32_BYTES
            valid = valid and 0 <= begin <= end <= len(self._map) - self._begin
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise CheckpointError(
                f"{self._path}: has no {name} of {length} fp32 elements; use another checkpoint"
            )
        return self._begin + begin

    def prefetch(self, begin: int, end: int) -> None:
        """Have the kernel read bytes [begin, end) in the background."""
        begin -= begin % mmap.PAGESIZE
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)
