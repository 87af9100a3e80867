"""One rank's file: what it writes, copied to host memory at once or on the way to the disk.

A safetensors file whose tensors go by kind, not by parameter: a rank that reads weights alone
finds them side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hg_scale.checkpoint.checksum import checksum_text, new_digest
from hg_scale.checkpoint.fragments import KINDS, Fragment

_CHUNK = 4 << 20  # elements written at a time: 16 MiB
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class LocalState:
    """A parameter's fragment on this rank, as flat views into the optimizer's own tensors."""

    parameter: nn.Parameter
    fragment: Fragment
    tensors: dict[str, Tensor]  # by kind, see fragments.KINDS

    def part(self, start: int, length: int) -> LocalState:
        """Elements [start, start + length) of the fragment."""
        piece = Fragment(self.fragment.slice, self.fragment.start + start, length)
        tensors = {kind: tensor.narrow(0, start, length) for kind, tensor in self.tensors.items()}
        return LocalState(self.parameter, piece, tensors)


@dataclass(frozen=True)
class Staged:
    """What a rank writes: its fragments, and flat fp32 tensors that are the file's data in order.

    `lengths` are elements by the tensor's name in the file, `NUMBER.KIND`.
    """

    fragments: list[Fragment]
    lengths: dict[str, int]
    data: list[Tensor]

    def header(self) -> bytes:
        """What a safetensors file begins with."""
        ends = list(accumulate(n * _FLOAT for n in self.lengths.values()))
        entries = {
            name: {
                "dtype": "F32",
                "shape": [length],
                "data_offsets": [end - length * _FLOAT, end],
            }
            for (name, length), end in zip(self.lengths.items(), ends, strict=True)
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        return len(text).to_bytes(8, "little") + text


def gather(states: Iterable[LocalState]) -> Staged:
    """The states as they stand in the optimizer: views, no copies."""
    states = list(states)
    lengths, data = {}, []
    for kind in KINDS:
        for number, local in enumerate(states):
            lengths[f"{number}.{kind}"] = local.fragment.length
            data.append(local.tensors[kind].detach())
    return Staged([local.fragment for local in states], lengths, data)


def share(states: Iterable[LocalState], index: int, count: int) -> Iterator[LocalState]:
    """The `index`-th of `count` equal shares of the states laid end to end, as ZeRO cuts."""
    states = list(states)
    total = sum(local.fragment.length for local in states)
    begin, end = total * index // count, total * (index + 1) // count
    position = 0
    for local in states:
        first = max(begin - position, 0)
        last = min(end - position, local.fragment.length)
        if first < last:
            yield local.part(first, last - first)
        position += local.fragment.length


class HostBuffer:
    """Host memory for one rank's file, kept from save to save; pinned where data is on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, staged: Staged) -> Staged:
        """The same in host memory; what it was copied from may change at once."""
        total = sum(staged.lengths.values())
        on_gpu = any(tensor.is_cuda for tensor in staged.data)
        if self._buffer.numel() != total:
            self._buffer = torch.empty(0)  # let go of the old one first
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=on_gpu)
        position = 0
        for tensor in staged.data:
            target = self._buffer[position : position + tensor.numel()]
            target.copy_(tensor, non_blocking=on_gpu)
            position += tensor.numel()
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return Staged(staged.fragments, staged.lengths, [self._buffer])


def write_rank_file(path: Path, staged: Staged) -> dict[str, Any]:
    """Write the file through to the disk; its entry in the manifest.

    Raises OSError naming the file.
    """
    try:
        return _write(path, staged)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write knows none
        raise


def _write(path: Path, staged: Staged) -> dict[str, Any]:
    digest, sent = new_digest(), 0
    with path.open("xb") as file:
        for chunk in _chunks(staged):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() - sent >= _CHUNK * _FLOAT:
                sent = _send_on(file, sent)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {
        "name": path.name,
        "bytes": size,
        "checksum": checksum_text(digest),
        "fragments": [fragment.to_json() for fragment in staged.fragments],
    }


def _send_on(file: BufferedWriter, begin: int) -> int:
    """Have the system write what it holds of the file, instead of all at the end; where it ends.

    It also lets go of that memory, which nobody will read again.
    """
    file.flush()
    end = file.tell()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    return end


def _chunks(staged: Staged) -> Iterator[bytes | memoryview]:
    yield staged.header()
    for tensor in staged.data:
        for part in tensor.chunk(max(1, ceil(tensor.numel() / _CHUNK))):
            if part.numel():
                yield part.to("cpu", torch.float32).contiguous().numpy().data.cast("B")
