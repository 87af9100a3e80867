"""The file of one rank: what it holds, staged in host memory or streamed to disk.

It is a safetensors file ordered by kind (all weights, then the moments), not by parameter, so that
a reader of weights alone finds them contiguous.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hg_scale.checkpoint.checksum import format_checksum, new_digest
from hg_scale.checkpoint.fragments import KINDS, Fragment
from hg_scale.checkpoint.safetensors_file import build_header

_CHUNK = 4 << 20  # elements written at a time: 16 MiB
_FP32_BYTES = 4


@dataclass(frozen=True)
class LocalState:
    """A parameter's fragment on this rank, as flat views into the optimizer's own tensors."""

    parameter: nn.Parameter
    fragment: Fragment
    tensors: dict[str, Tensor]  # by kind, see fragments.KINDS

    def part(self, start: int, length: int) -> LocalState:
        """Return elements [start, start + length) of the fragment."""
        piece = Fragment(self.fragment.slice, self.fragment.start + start, length)
        tensors = {kind: tensor.narrow(0, start, length) for kind, tensor in self.tensors.items()}
        return LocalState(self.parameter, piece, tensors)


@dataclass(frozen=True)
class Staged:
    """What a rank writes: its fragments, and flat fp32 tensors with the file's data in order.

    lengths: elements by the tensor's name in the file, `NUMBER.KIND`.
    """

    fragments: list[Fragment]
    lengths: dict[str, int]
    data: list[Tensor]


def stage(states: Iterable[LocalState]) -> Staged:
    """Return what a rank writes, as views of the optimizer's tensors; nothing is copied."""
    states = list(states)
    lengths, data = {}, []
    for kind in KINDS:
        for number, local in enumerate(states):
            lengths[f"{number}.{kind}"] = local.fragment.length
            data.append(local.tensors[kind].detach())
    return Staged([local.fragment for local in states], lengths, data)


def equal_share(states: Iterable[LocalState], index: int, count: int) -> Iterator[LocalState]:
    """Yield the `index`-th of `count` equal shares of the states, concatenated as in ZeRO."""
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
    """Host memory for one rank's file, reused for each save; pinned if the data is on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, staged: Staged) -> Staged:
        """Copy into the buffer; the originals may change as soon as this returns."""
        total = sum(staged.lengths.values())
        on_gpu = any(tensor.is_cuda for tensor in staged.data)
        if self._buffer.numel() != total:
            self._buffer = torch.empty(0)  # free the old one first
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
    """Write and flush the file; return its entry in the manifest. Raises OSError naming it."""
    try:
        return _write(path, staged)
    except OSError as error:
        error.filename = error.filename or str(path)  # errors of write() carry no name
        raise


def _write(path: Path, staged: Staged) -> dict[str, Any]:
    digest, flushed = new_digest(), 0
    with path.open("xb") as file:
        for chunk in _chunks(staged):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() - flushed >= _CHUNK * _FP32_BYTES:
                flushed = _start_writeback(file, flushed)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {
        "name": path.name,
        "bytes": size,
        "checksum": format_checksum(digest),
        "fragments": [fragment.to_json() for fragment in staged.fragments],
    }


def _start_writeback(file: BufferedWriter, begin: int) -> int:
    """Have the kernel write bytes from `begin` on now, not all at the end; return where they end.

    It also drops those pages from the page cache: nobody will read them again.
    """
    file.flush()
    end = file.tell()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    return end


def _chunks(staged: Staged) -> Iterator[bytes | memoryview]:
    header, _ = build_header((name, (length,)) for name, length in staged.lengths.items())
    yield header
    for tensor in staged.data:
        for part in tensor.chunk(max(1, ceil(tensor.numel() / _CHUNK))):
            if part.numel():
                yield part.to("cpu", torch.float32).contiguous().numpy().data.cast("B")
