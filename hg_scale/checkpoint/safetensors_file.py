"""Writing safetensors files of any size a piece at a time, by several processes at once.

The library's own writer wants all tensors of a file in memory. The format is a length (8 bytes,
little-endian), a JSON header that says where each tensor lies, and the tensors: so the header goes
first, and whoever has some elements puts them where they belong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp32": ("F32", torch.float32, 4), "bf16": ("BF16", torch.bfloat16, 2)}


@dataclass(frozen=True)
class TensorRegion:
    """A tensor to be written: `offset` of its first byte in the file `path`."""

    path: Path
    offset: int
    dtype: str  # a key of DTYPES

    def write(self, start: int, elements: Tensor) -> None:
        """Put flat `elements` where the tensor's element `start` lies. Raises OSError."""
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


def create(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: str = "fp32",
    metadata: dict[str, str] | None = None,
) -> dict[str, TensorRegion]:
    """A file with its header and room for the tensors, which read as zeros until written.

    `tensors`: names and shapes, in the order of the file. Raises OSError.
    """
    code, _, size = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offsets, end = {}, 0
    for name, shape in tensors:
        offsets[name] = end
        end += prod(shape) * size
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    first = 8 + len(text)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(first + end)
    return {name: TensorRegion(path, first + offset, dtype) for name, offset in offsets.items()}
