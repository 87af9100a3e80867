"""Fragments: which elements of which parameter a rank holds, and how to reshard them.

A parameter has a name and an unsharded shape. Tensor parallelism divides it along one dimension
into equal slices; ZeRO divides a flattened slice at any element. A fragment is such a flat range of
such a slice. The position of its elements in the unsharded parameter follows from these numbers
alone, so any layout can read what another wrote:

    unsharded (rows, columns)  slice 1 of 2      fragment [start, start + length) of it
    . . . . o o o o            o o o o           . . x x
    . . . . o o o o            o o o o           x x x x
    . . . . o o o o            o o o o           x . . .

Pure arithmetic on flat fp32 arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[np.float32]

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""The fp32 master weights of a parameter, and Adam's first and second moment."""


@dataclass(frozen=True)
class Slice:
    """The part of a parameter that a tensor-parallel rank holds.

    It is the `index`-th of `count` equal slices along `dim`; `dim` is None if tensor parallelism
    does not shard the parameter. `shape` is the unsharded shape. Raises ValueError if there is no
    such slice.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.dim is None:
            legal = (self.index, self.count) == (0, 1)
        else:
            legal = 0 <= self.dim < len(self.shape) and 0 <= self.index < self.count
            legal = legal and self.shape[self.dim] % self.count == 0
        if not legal:
            raise ValueError(
                f"{self.name}: no slice {self.index} of {self.count} along dimension {self.dim} "
                f"of shape {self.shape}"
            )

    @property
    def size(self) -> int:
        """Number of elements of the slice."""
        return prod(self.shape) // self.count


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a slice, flattened in row-major order."""

    slice: Slice
    start: int
    length: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.length

    def to_json(self) -> dict[str, Any]:
        """Return the fragment as an entry of the manifest."""
        piece = self.slice
        return {
            "name": piece.name,
            "shape": list(piece.shape),
            "dim": piece.dim,
            "index": piece.index,
            "count": piece.count,
            "start": self.start,
            "length": self.length,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fragment:
        """Parse an entry of the manifest. Raises ValueError if there are no such elements."""
        piece = Slice(data["name"], tuple(data["shape"]), data["dim"], data["index"], data["count"])
        fragment = cls(piece, data["start"], data["length"])
        if not 0 <= fragment.start <= fragment.end <= piece.size:
            raise ValueError(
                f"{piece.name}: no elements {fragment.start} to {fragment.end} in a slice of "
                f"{piece.size}"
            )
        return fragment


@dataclass(frozen=True)
class _Rectangle:
    """Elements of a fragment that are a block of the unsharded parameter, seen as a matrix.

    The block is rows [top, bottom) by columns [left, right). `offset` is the position of its first
    element in the fragment, `stride` the distance from one row to the next in the fragment.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    stride: int

    def view(self, data: Array, rows: slice, columns: slice, origin: int = 0) -> Array:
        """View part of the block as a matrix. `data`: the fragment from element `origin` on."""
        (step,) = data.strides
        return as_strided(
            data[self.position(rows.start, columns.start) - origin :],
            (rows.stop - rows.start, columns.stop - columns.start),
            (self.stride * step, step),
        )

    def span(self, rows: slice, columns: slice) -> tuple[int, int]:
        """Return the range (begin, end) of the fragment that contains part of the block."""
        end = self.position(rows.stop - 1, columns.stop - 1) + 1
        return self.position(rows.start, columns.start), end

    def position(self, row: int, column: int) -> int:
        """Return the position of an element in the fragment."""
        return self.offset + (row - self.top) * self.stride + column - self.left


def _rectangles(fragment: Fragment, dim: int) -> Iterator[_Rectangle]:
    """Divide a fragment into at most three blocks: end of a row, full rows, start of a row.

    The rows of the matrix are the dimensions before `dim`, its columns `dim` and those after.
    """
    piece = fragment.slice
    width = prod(piece.shape[dim:]) // piece.count
    first = piece.index * width
    position = fragment.start
    while position < fragment.end:
        row, column = divmod(position, width)
        rows = (fragment.end - position) // width
        if column or not rows:
            stop = min(width, column + fragment.end - position)
            rows, size = 1, stop - column
        else:
            stop, size = width, rows * width
        offset = position - fragment.start
        yield _Rectangle(row, row + rows, first + column, first + stop, offset, width)
        position += size


def assemble(
    target: Fragment,
    sources: Iterable[Fragment],
    read: Callable[[Fragment, int, int], Array],
) -> Array:
    """Return the elements of `target`, flat, from the fragments that another layout wrote.

    read(fragment, begin, end) returns elements [begin, end) of a source. Raises ValueError naming
    the parameter if shapes or slices do not fit, or elements are missing. Duplicates that make up
    for missing elements are not detected here but by `coverage_problems`.
    """
    result = np.empty(target.length, np.float32)
    found = 0
    for fragment in sources:
        for to, source, rows, columns in _overlaps(target, fragment):
            begin, end = source.span(rows, columns)
            data = read(fragment, begin, end)
            to.view(result, rows, columns)[:] = source.view(data, rows, columns, begin)
            found += (rows.stop - rows.start) * (columns.stop - columns.start)
    if found != target.length:
        raise ValueError(
            f"{target.slice.name}: the checkpoint has {found:,} of the {target.length:,} elements "
            "that this rank needs; use another checkpoint"
        )
    return result


def source_ranges(
    target: Fragment, sources: Iterable[Fragment]
) -> Iterator[tuple[Fragment, int, int]]:
    """Yield the (source, begin, end) that `assemble` will read.

    Raises ValueError naming the parameter if shapes or slices do not fit.
    """
    for fragment in sources:
        for _, source, rows, columns in _overlaps(target, fragment):
            yield fragment, *source.span(rows, columns)


def _overlaps(
    target: Fragment, source: Fragment
) -> Iterator[tuple[_Rectangle, _Rectangle, slice, slice]]:
    """Yield the blocks of both fragments that overlap, with their common rows and columns."""
    dim = _common_dimension(source.slice, target.slice)
    for to in _rectangles(target, dim):
        for block in _rectangles(source, dim):
            rows = slice(max(to.top, block.top), min(to.bottom, block.bottom))
            columns = slice(max(to.left, block.left), min(to.right, block.right))
            if rows.start < rows.stop and columns.start < columns.stop:
                yield to, block, rows, columns


def _common_dimension(source: Slice, target: Slice) -> int:
    """Return the dimension along which either is sharded."""
    if (source.name, source.shape) != (target.name, target.shape):
        raise ValueError(
            f"{target.name}: shape {source.shape} in the checkpoint, the model needs {target.shape}"
        )
    dims = {piece.dim for piece in (source, target) if piece.count > 1 and piece.dim is not None}
    if len(dims) > 1:
        raise ValueError(
            f"{target.name}: sharded along dimension {source.dim} in the checkpoint, along "
            f"{target.dim} in the model; read it with parallel.tensor = 1"
        )
    return dims.pop() if dims else 0


def coverage_problems(fragments: Iterable[Fragment]) -> list[str]:
    """Return one line for each slice whose elements are not covered exactly once."""
    by_name: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        by_name[fragment.slice.name].append(fragment)
    problems = []
    for name, parts in by_name.items():
        first = parts[0].slice
        if any((f.slice.shape, f.slice.count) != (first.shape, first.count) for f in parts):
            problems.append(f"{name}: its fragments disagree on shape or number of slices")
            continue
        for index in range(min(first.count, len(parts) + 1)):  # one of these is missing, if any
            ranges = sorted((f.start, f.end) for f in parts if f.slice.index == index)
            ends = [0, *(end for _, end in ranges)]
            starts = [*(start for start, _ in ranges), first.size]
            if ends != starts:
                problems.append(
                    f"{name}: slice {index} of {first.count}, of {first.size:,} elements, is "
                    f"covered by {ranges}"
                )
    return problems
