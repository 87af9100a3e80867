"""Read the parameters and optimizer states of a checkpoint, whichever layout wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import verify_sizes
from hg_scale.checkpoint.fragments import (
    Array,
    Fragment,
    Slice,
    assemble,
    coverage_problems,
    source_ranges,
)
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.checkpoint.mapped_safetensors import MappedSafetensors

_FP32_BYTES = 4
_MAX_GAP = 1 << 20  # bytes; ranges of a file that are closer than this are read as one


class CheckpointReader:
    """A checkpoint open for reading, memory-mapped. Needs neither DeepSpeed nor a process group.

    Raises CheckpointError if the checkpoint is incomplete.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest: dict[str, Any] = read_manifest(checkpoint)
        if problem := verify_sizes(checkpoint):
            raise CheckpointError(f"{checkpoint}: {problem}")
        self._files: dict[str, MappedSafetensors] = {}
        self._locations: dict[Fragment, tuple[str, int]] = {}  # file, number in the file
        self._verified: set[str] = set()  # parameters whose coverage was verified
        self.fragments: dict[str, list[Fragment]] = defaultdict(list)  # by parameter
        for file in self.manifest["files"]:
            for number, data in enumerate(file["fragments"]):
                try:
                    fragment = Fragment.from_json(data)
                except ValueError as error:
                    raise CheckpointError(f"{checkpoint}: {file['name']}: {error}") from None
                self._locations[fragment] = (file["name"], number)
                self.fragments[fragment.slice.name].append(fragment)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The unsharded shape of every parameter."""
        return {name: fragments[0].slice.shape for name, fragments in self.fragments.items()}

    def read(self, kind: str, target: Fragment) -> Tensor:
        """Return the elements of a fragment, flat, in fp32. kind: one of `fragments.KINDS`.

        Raises CheckpointError if the checkpoint lacks them.
        """

        def read_range(fragment: Fragment, begin: int, end: int) -> Array:
            name, number = self._locations[fragment]
            return self._open(name).tensor(f"{number}.{kind}", fragment.length)[begin:end]

        fragments = self.fragments.get(target.slice.name, [])
        if fragments and fragments[0].slice.shape != target.slice.shape:
            raise CheckpointError(
                f"{self.path}: {target.slice.name} has shape {fragments[0].slice.shape}, the model "
                f"needs {target.slice.shape}"
            )
        try:
            self._verify_coverage(target.slice.name, fragments)
            return torch.from_numpy(assemble(target, fragments, read_range))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {kind} of {error}") from None

    def _verify_coverage(self, name: str, fragments: list[Fragment]) -> None:
        """Raise ValueError unless every element is stored exactly once; verified once per name."""
        if name not in self._verified:
            if problems := coverage_problems(fragments):
                raise ValueError(problems[0])
            self._verified.add(name)

    def prefetch(self, needed: Iterable[tuple[str, Fragment]]) -> int:
        """Have the kernel read ahead what `read(kind, fragment)` will need, in long ranges.

        Returns the number of bytes. Raises CheckpointError as `read` does.
        """
        by_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for kind, target in needed:
            try:
                found = list(source_ranges(target, self.fragments.get(target.slice.name, [])))
            except ValueError as error:
                raise CheckpointError(f"{self.path}: {kind} of {error}") from None
            for fragment, begin, end in found:
                name, number = self._locations[fragment]
                first = self._open(name).offset(f"{number}.{kind}", fragment.length)
                by_file[name].append((first + begin * _FP32_BYTES, first + end * _FP32_BYTES))
        total = 0
        for name, ranges in by_file.items():
            for begin, end in merge_ranges(ranges, _MAX_GAP):
                self._open(name).prefetch(begin, end)
                total += end - begin
        return total

    def full_tensor(self, name: str, kind: str = "fp32") -> Tensor:
        """Return an unsharded parameter, or a moment of it, in fp32."""
        piece = Slice(name, self.shapes[name])
        return self.read(kind, Fragment(piece, 0, piece.size)).view(piece.shape)

    def _open(self, name: str) -> MappedSafetensors:
        if name not in self._files:
            self._files[name] = MappedSafetensors(self.path / name)
        return self._files[name]


def merge_ranges(ranges: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Sort (begin, end) ranges and merge those that are at most `gap` apart."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if result and begin - result[-1][1] <= gap:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def read_parameters(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, unsharded fp32 tensor) of every parameter, one at a time."""
    reader = CheckpointReader(checkpoint)
    for name in reader.fragments:
        yield name, reader.full_tensor(name)
