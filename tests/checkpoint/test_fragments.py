"""Fragments written in any layout are resharded into any other exactly."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hg_scale.checkpoint.fragments import (
    Array,
    Fragment,
    Slice,
    assemble,
    coverage_problems,
    source_ranges,
)


def fragments_of(draw: Any, shape: tuple[int, ...], dim: int, label: str) -> list[Fragment]:
    """Draw a layout of a parameter: equal slices, each flattened and divided at any elements."""
    counts = [n for n in (1, 2, 3, 4, 6) if shape[dim] % n == 0]
    count = draw(st.sampled_from(counts), label=f"{label}: slices")
    result = []
    for index in range(count):
        sharded = dim if count > 1 or draw(st.booleans()) else None
        piece = Slice("w", shape, sharded, index, count)
        inner = draw(st.lists(st.integers(0, piece.size), max_size=4), label=f"{label}: edges")
        edges = sorted({0, piece.size, *inner})
        result += [Fragment(piece, a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return result


def data_of(fragment: Fragment, full: Array) -> Array:
    """Return a fragment's elements, by the definition of slices and row-major order."""
    piece = fragment.slice
    part = full if piece.dim is None else np.split(full, piece.count, piece.dim)[piece.index]
    return part.reshape(-1)[fragment.start : fragment.end]


@given(st.data())
def test_any_layout_reads_any_other(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    full = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    written = fragments_of(data.draw, shape, dim, "writer")
    assert coverage_problems(written) == []

    reads = []

    def read(fragment: Fragment, a: int, b: int) -> Array:
        assert 0 <= a < b <= fragment.length
        reads.append((fragment, a, b))
        return data_of(fragment, full)[a:b]

    for target in fragments_of(data.draw, shape, dim, "reader"):
        reads.clear()
        np.testing.assert_array_equal(assemble(target, written, read), data_of(target, full))
        assert list(source_ranges(target, written)) == reads


def test_scalar_parameter() -> None:
    scalar = Fragment(Slice("gain", ()), 0, 1)
    value = assemble(scalar, [scalar], lambda f, a, b: np.ones(1, np.float32))
    assert value.tolist() == [1.0]


def test_only_needed_elements_are_read() -> None:
    """A rank that holds one slice of a matrix sharded by rows does not read the others."""
    reads = []

    def read(fragment: Fragment, a: int, b: int) -> Array:
        reads.append((fragment.slice.index, a, b))
        return np.zeros(b - a, np.float32)

    written = [Fragment(Slice("w", (8, 4), 0, i, 4), 0, 8) for i in range(4)]
    assemble(Fragment(Slice("w", (8, 4), 0, 1, 2), 4, 8), written, read)
    assert reads == [(2, 4, 8), (3, 0, 4)]


def test_missing_elements_are_named() -> None:
    written = [Fragment(Slice("w", (4,)), 0, 3)]
    with pytest.raises(ValueError, match="w: the checkpoint has 3 of the 4 elements"):
        assemble(
            Fragment(Slice("w", (4,)), 0, 4), written, lambda f, a, b: np.zeros(b - a, np.float32)
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Slice("w", (4, 8)), r"w: shape \(4, 8\) in the checkpoint, the model needs \(8, 4\)"),
        (Slice("w", (8, 4), 1, 0, 2), "sharded along dimension 1 in the checkpoint, along 0"),
    ],
)
def test_other_shapes_and_sharded_dimensions_are_refused(source: Slice, message: str) -> None:
    target = Fragment(Slice("w", (8, 4), 0, 0, 2), 0, 16)
    with pytest.raises(ValueError, match=message):
        assemble(target, [Fragment(source, 0, 16)], lambda f, a, b: np.zeros(b - a, np.float32))


@pytest.mark.parametrize(("dim", "index", "count"), [(0, 2, 2), (1, 0, 3), (None, 0, 2)])
def test_impossible_slices_are_refused(dim: int | None, index: int, count: int) -> None:
    with pytest.raises(ValueError, match="w: no slice"):
        Slice("w", (4, 4), dim, index, count)


@given(st.data())
def test_coverage_problems_finds_missing_and_duplicate_elements(data: st.DataObject) -> None:
    written = fragments_of(data.draw, (4, 6), 1, "writer")
    assume(len(written) > 1)  # a parameter without any fragment is unknown to `coverage_problems`
    victim = data.draw(st.sampled_from(written))
    assert coverage_problems([f for f in written if f is not victim])
    assert coverage_problems([*written, victim])


def test_json_round_trip() -> None:
    fragment = Fragment(Slice("w", (4, 6), 1, 1, 2), 3, 5)
    assert Fragment.from_json(fragment.to_json()) == fragment


@pytest.mark.timeout(10)
def test_slices_of_a_huge_count_are_reported_at_once() -> None:
    piece = Slice("a", (1 << 40,), 0, 0, 1 << 40)
    (problem,) = coverage_problems([Fragment(piece, 0, 1)])
    assert "a: slice 1 of 1099511627776, of 1 elements, is covered by []" in problem


def test_elements_beyond_a_slice_are_refused() -> None:
    entry = Fragment(Slice("a", (4,)), 2, 2).to_json()
    assert Fragment.from_json(entry).end == 4
    with pytest.raises(ValueError, match="a: no elements 2 to 5 in a slice of 4"):
        Fragment.from_json({**entry, "length": 3})
