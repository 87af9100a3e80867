"""Whatever layout wrote a parameter, any other reassembles its part of it exactly."""

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
    cover_problems,
    spans,
)


def fragments_of(draw: Any, shape: tuple[int, ...], dim: int, label: str) -> list[Fragment]:
    """A parameter in one layout: equal slices, each cut anywhere when laid flat."""
    counts = [n for n in (1, 2, 3, 4, 6) if shape[dim] % n == 0]
    count = draw(st.sampled_from(counts), label=f"{label}: slices")
    result = []
    for index in range(count):
        cut = dim if count > 1 or draw(st.booleans()) else None
        piece = Slice("w", shape, cut, index, count)
        inner = draw(st.lists(st.integers(0, piece.size), max_size=4), label=f"{label}: cuts")
        edges = sorted({0, piece.size, *inner})
        result += [Fragment(piece, a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return result


def data_of(fragment: Fragment, whole: Array) -> Array:
    """What the fragment holds, by the definition of a slice and of flat order."""
    piece = fragment.slice
    part = whole if piece.dim is None else np.split(whole, piece.count, piece.dim)[piece.index]
    return part.reshape(-1)[fragment.start : fragment.end]


@given(st.data())
def test_any_layout_reads_what_any_other_wrote(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    whole = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    written = fragments_of(data.draw, shape, dim, "writer")
    assert cover_problems(written) == []

    asked = []

    def piece(fragment: Fragment, a: int, b: int) -> Array:
        assert 0 <= a < b <= fragment.length
        asked.append((fragment, a, b))
        return data_of(fragment, whole)[a:b]

    for wanted in fragments_of(data.draw, shape, dim, "reader"):
        asked.clear()
        np.testing.assert_array_equal(assemble(wanted, written, piece), data_of(wanted, whole))
        assert list(spans(wanted, written)) == asked


def test_a_scalar_is_a_parameter_too() -> None:
    scalar = Fragment(Slice("gain", ()), 0, 1)
    value = assemble(scalar, [scalar], lambda f, a, b: np.ones(1, np.float32))
    assert value.tolist() == [1.0]


def test_only_what_is_wanted_is_read() -> None:
    """A rank that holds one slice of a matrix cut by rows reads no other's."""
    asked = []

    def piece(fragment: Fragment, a: int, b: int) -> Array:
        asked.append((fragment.slice.index, a, b))
        return np.zeros(b - a, np.float32)

    written = [Fragment(Slice("w", (8, 4), 0, i, 4), 0, 8) for i in range(4)]
    assemble(Fragment(Slice("w", (8, 4), 0, 1, 2), 4, 8), written, piece)
    assert asked == [(2, 4, 8), (3, 0, 4)]


def test_missing_elements_are_named() -> None:
    written = [Fragment(Slice("w", (4,)), 0, 3)]
    with pytest.raises(ValueError, match="w: 3 elements are there of the 4"):
        assemble(
            Fragment(Slice("w", (4,)), 0, 4), written, lambda f, a, b: np.zeros(b - a, np.float32)
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Slice("w", (4, 8)), r"w: shape \(4, 8\) in the checkpoint, the model needs \(8, 4\)"),
        (Slice("w", (8, 4), 1, 0, 2), "cut along dimension 1 in the checkpoint, along 0"),
    ],
)
def test_other_shapes_and_cuts_are_refused(source: Slice, message: str) -> None:
    target = Fragment(Slice("w", (8, 4), 0, 0, 2), 0, 16)
    with pytest.raises(ValueError, match=message):
        assemble(target, [Fragment(source, 0, 16)], lambda f, a, b: np.zeros(b - a, np.float32))


@pytest.mark.parametrize(("dim", "index", "count"), [(0, 2, 2), (1, 0, 3), (None, 0, 2)])
def test_slices_that_do_not_exist(dim: int | None, index: int, count: int) -> None:
    with pytest.raises(ValueError, match="w: no slice"):
        Slice("w", (4, 4), dim, index, count)


@given(st.data())
def test_cover_problems_finds_a_hole_and_a_double(data: st.DataObject) -> None:
    written = fragments_of(data.draw, (4, 6), 1, "writer")
    assume(len(written) > 1)  # a parameter of which nothing is there is not known of at all
    victim = data.draw(st.sampled_from(written))
    assert cover_problems([f for f in written if f is not victim])
    assert cover_problems([*written, victim])


def test_fragments_travel_as_json() -> None:
    fragment = Fragment(Slice("w", (4, 6), 1, 1, 2), 3, 5)
    assert Fragment.from_json(fragment.to_json()) == fragment
