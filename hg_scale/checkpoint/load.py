"""Reading: the elements a rank needs, whatever layout wrote them, memory-mapped."""

from __future__ import annotations

import json
import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import damage, read_manifest
from hg_scale.checkpoint.fragments import (
    Array,
    Fragment,
    Slice,
    assemble,
    cover_problems,
    spans,
)

_FLOAT = 4  # bytes
_GAP = 1 << 20  # bytes; stretches of a file that are nearer than this are read as one


class CheckpointReader:
    """A checkpoint open for reading. Needs neither DeepSpeed nor a process group.

    Raises CheckpointError where the checkpoint is not whole.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest: dict[str, Any] = read_manifest(checkpoint)
        fault = damage(checkpoint)
        if fault:
            raise CheckpointError(f"{checkpoint}: {fault}")
        self._files: dict[str, _MappedFile] = {}
        self._place: dict[Fragment, tuple[str, int]] = {}
        self._covered: set[str] = set()  # names whose fragments were looked at
        self.written: dict[str, list[Fragment]] = defaultdict(list)
        for file in self.manifest["files"]:
            for number, data in enumerate(file["fragments"]):
                try:
                    fragment = Fragment.from_json(data)
                except ValueError as error:
                    raise CheckpointError(f"{checkpoint}: {file['name']}: {error}") from None
                self._place[fragment] = (file["name"], number)
                self.written[fragment.slice.name].append(fragment)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's whole shape."""
        return {name: fragments[0].slice.shape for name, fragments in self.written.items()}

    def read(self, kind: str, wanted: Fragment) -> Tensor:
        """Flat fp32 elements. Raises CheckpointError where the checkpoint lacks them."""

        def piece(fragment: Fragment, a: int, b: int) -> Array:
            name, number = self._place[fragment]
            return self._open(name).tensor(f"{number}.{kind}", fragment.length)[a:b]

        written = self.written.get(wanted.slice.name, [])
        if written and written[0].slice.shape != wanted.slice.shape:
            raise CheckpointError(
                f"{self.path}: {wanted.slice.name} has shape {written[0].slice.shape}, the model "
                f"needs {wanted.slice.shape}"
            )
        try:
            self._require_cover(wanted.slice.name, written)
            return torch.from_numpy(assemble(wanted, written, piece))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {kind} of {error}") from None

    def _require_cover(self, name: str, written: list[Fragment]) -> None:
        """Raise ValueError where elements are missing or there twice; looked at once a name."""
        if name not in self._covered:
            if problems := cover_problems(written):
                raise ValueError(problems[0])
            self._covered.add(name)

    def prefetch(self, needed: Iterable[tuple[str, Fragment]]) -> int:
        """Have the system read ahead what `read` will be asked for, in long stretches of files.

        Returns the bytes of these. Raises CheckpointError as `read` does.
        """
        stretches: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for kind, wanted in needed:
            try:
                found = list(spans(wanted, self.written.get(wanted.slice.name, [])))
            except ValueError as error:
                raise CheckpointError(f"{self.path}: {kind} of {error}") from None
            for fragment, begin, end in found:
                name, number = self._place[fragment]
                first = self._open(name).offset(f"{number}.{kind}", fragment.length)
                stretches[name].append((first + begin * _FLOAT, first + end * _FLOAT))
        total = 0
        for name, pieces in stretches.items():
            for begin, end in merged(pieces, _GAP):
                self._open(name).will_need(begin, end)
                total += end - begin
        return total

    def whole(self, name: str, kind: str = "fp32") -> Tensor:
        """One parameter, whole."""
        piece = Slice(name, self.shapes[name])
        return self.read(kind, Fragment(piece, 0, piece.size)).view(piece.shape)

    def _open(self, name: str) -> _MappedFile:
        if name not in self._files:
            self._files[name] = _MappedFile(self.path / name)
        return self._files[name]


class _MappedFile:
    """A safetensors file of flat fp32 tensors in memory; pages are read when they are looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._begin = 8 + int.from_bytes(self._map[:8], "little")
            self._entries = json.loads(self._map[8 : self._begin])
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def tensor(self, name: str, length: int) -> Array:
        """A view of the file."""
        return np.frombuffer(self._map, np.float32, length, self.offset(name, length))

    def offset(self, name: str, length: int) -> int:
        """Where in the file a tensor of `length` elements begins, in bytes.

        Raises CheckpointError where there is none of that name and length.
        """
        entry = self._entries.get(name, {})
        begin, end = entry.get("data_offsets", (0, 0))
        there = entry.get("dtype") == "F32" and end - begin == length * _FLOAT
        if not there or not 0 <= begin <= end <= len(self._map) - self._begin:
            raise CheckpointError(
                f"{self._path}: has no {name} of {length} fp32 elements; use another checkpoint"
            )
        return self._begin + begin

    def will_need(self, begin: int, end: int) -> None:
        """Have bytes [begin, end) read in the background."""
        begin -= begin % mmap.PAGESIZE
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)


def merged(pieces: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Ranges (begin, end) in order, those that are at most `gap` apart as one."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(pieces):
        if result and begin - result[-1][1] <= gap:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def read_parameters(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, in fp32, one at a time: for a plain model."""
    reader = CheckpointReader(checkpoint)
    for name in reader.written:
        yield name, reader.whole(name)
