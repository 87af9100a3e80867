"""Write safetensors files piece by piece; the library holds a file's tensors in memory.

A safetensors file is the length of its header (8 bytes, little-endian), a JSON header with dtype,
shape and byte offsets of each tensor, and the data. Here a file is created with its header and room
for the data, which several processes can fill at once. `mapped_safetensors` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": ("F32", torch.float32, 4), "bf16": ("BF16", torch.bfloat16, 2)}


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
