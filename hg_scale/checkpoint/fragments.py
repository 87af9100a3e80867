"""Fragments: which elements of which parameter a rank holds, and how to assemble them.

A parameter has a canonical name and a whole shape. Tensor parallelism cuts it along one dimension
into equal slices; ZeRO cuts a slice, laid flat, anywhere. A fragment is such a flat piece of such
a slice. Where its elements lie in the whole parameter follows from these numbers alone, so what
one layout wrote, any other can read:

    whole (rows, columns)      slice 1 of 2      fragment [start, start + length) of it
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
"""The fp32 master of a parameter, and Adam's first and second moment of its gradient."""


@dataclass(frozen=True)
class Slice:
    """Which part of which parameter a rank holds: `index` of `count` equal slices along `dim`.

    `shape` is the whole parameter's. `dim` is None where tensor parallelism does not cut it.
    Raises ValueError where there is no such slice.
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
            there = 0 <= self.dim < len(self.shape) and 0 <= self.index < self.count
            legal = there and self.shape[self.dim] % self.count == 0
        if not legal:
            raise ValueError(
                f"{self.name}: no slice {self.index} of {self.count} along dimension {self.dim} "
                f"of shape {self.shape}"
            )

    @property
    def size(self) -> int:
        """Elements of the slice."""
        return prod(self.shape) // self.count


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a slice, laid flat in row-major order."""

    slice: Slice
    start: int
    length: int

    @property
    def end(self) -> int:
        """One past its last element."""
        return self.start + self.length

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
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
        """The inverse of `to_json`."""
        piece = Slice(data["name"], tuple(data["shape"]), data["dim"], data["index"], data["count"])
        return cls(piece, data["start"], data["length"])


@dataclass(frozen=True)
class _Rectangle:
    """A fragment's elements that are rows x columns of the whole parameter, seen as a matrix.

    `offset` is where the first one lies in the fragment, `stride` how far it is to the next row.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    stride: int

    def view(self, data: Array, rows: slice, columns: slice, origin: int = 0) -> Array:
        """Those elements of the fragment (`data` begins with its `origin`-th), as a matrix."""
        (step,) = data.strides
        return as_strided(
            data[self.at(rows.start, columns.start) - origin :],
            (rows.stop - rows.start, columns.stop - columns.start),
            (self.stride * step, step),
        )

    def span(self, rows: slice, columns: slice) -> tuple[int, int]:
        """The stretch of the fragment that has those elements: (begin, end)."""
        return self.at(rows.start, columns.start), self.at(rows.stop - 1, columns.stop - 1) + 1

    def at(self, row: int, column: int) -> int:
        """Where an element lies in the fragment."""
        return self.offset + (row - self.top) * self.stride + column - self.left


def _rectangles(fragment: Fragment, dim: int) -> Iterator[_Rectangle]:
    """At most three: the rest of a row, whole rows, the beginning of a row.

    The matrix has the dimensions before `dim` as its rows, `dim` and those after as its columns.
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
            rows, taken = 1, stop - column
        else:
            stop, taken = width, rows * width
        offset = position - fragment.start
        yield _Rectangle(row, row + rows, first + column, first + stop, offset, width)
        position += taken


def assemble(
    wanted: Fragment,
    written: Iterable[Fragment],
    piece: Callable[[Fragment, int, int], Array],
) -> Array:
    """The elements of `wanted`, flat, out of fragments that any layout wrote.

    `piece(fragment, a, b)` gives elements [a, b) of a written fragment. Raises ValueError naming
    the parameter where shapes or cuts do not fit, or elements are missing. That none is there
    twice, instead of another, is for `cover_problems` to say.
    """
    result = np.empty(wanted.length, np.float32)
    found = 0
    for fragment in written:
        for target, source, rows, columns in _overlaps(wanted, fragment):
            begin, end = source.span(rows, columns)
            data = piece(fragment, begin, end)
            target.view(result, rows, columns)[:] = source.view(data, rows, columns, begin)
            found += (rows.stop - rows.start) * (columns.stop - columns.start)
    if found != wanted.length:
        raise ValueError(
            f"{wanted.slice.name}: {found:,} elements are there of the {wanted.length:,} that "
            "this rank needs; use another checkpoint"
        )
    return result


def spans(wanted: Fragment, written: Iterable[Fragment]) -> Iterator[tuple[Fragment, int, int]]:
    """What `assemble` will ask for: (written fragment, begin, end).

    Raises ValueError naming the parameter where shapes or cuts do not fit.
    """
    for fragment in written:
        for _, source, rows, columns in _overlaps(wanted, fragment):
            yield fragment, *source.span(rows, columns)


def _overlaps(
    wanted: Fragment, fragment: Fragment
) -> Iterator[tuple[_Rectangle, _Rectangle, slice, slice]]:
    """Rows and columns that a rectangle of one and a rectangle of the other have in common."""
    dim = _common_dimension(fragment.slice, wanted.slice)
    for target in _rectangles(wanted, dim):
        for source in _rectangles(fragment, dim):
            rows = slice(max(target.top, source.top), min(target.bottom, source.bottom))
            columns = slice(max(target.left, source.left), min(target.right, source.right))
            if rows.start < rows.stop and columns.start < columns.stop:
                yield target, source, rows, columns


def _common_dimension(source: Slice, target: Slice) -> int:
    """The dimension along which either is cut."""
    if (source.name, source.shape) != (target.name, target.shape):
        raise ValueError(
            f"{target.name}: shape {source.shape} in the checkpoint, the model needs {target.shape}"
        )
    dims = {piece.dim for piece in (source, target) if piece.count > 1 and piece.dim is not None}
    if len(dims) > 1:
        raise ValueError(
            f"{target.name}: cut along dimension {source.dim} in the checkpoint, along "
            f"{target.dim} in the model; read it with parallel.tensor = 1"
        )
    return dims.pop() if dims else 0


def cover_problems(written: Iterable[Fragment]) -> list[str]:
    """One line for each slice whose elements are not covered exactly once."""
    parameters: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in written:
        parameters[fragment.slice.name].append(fragment)
    problems = []
    for name, fragments in parameters.items():
        first = fragments[0].slice
        if any((f.slice.shape, f.slice.count) != (first.shape, first.count) for f in fragments):
            problems.append(f"{name}: its fragments disagree on the whole shape or the cut")
            continue
        for index in range(first.count):
            here = sorted((f.start, f.end) for f in fragments if f.slice.index == index)
            ends = [0, *(end for _, end in here)]
            starts = [*(start for start, _ in here), first.size]
            if ends != starts:
                problems.append(
                    f"{name}: slice {index} of {first.count}, of {first.size:,} elements, is "
                    f"covered by {here}"
                )
    return problems
