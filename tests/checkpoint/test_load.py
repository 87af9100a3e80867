"""A rank reads only what it needs, in long ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.checkpoint import load
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.load import CheckpointReader, merge_ranges
from tests.checkpoint.test_retention import checkpoint
from tests.training.resumable import Run, parse
from tests.world import Worlds

RANGES = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=9)


@given(RANGES, st.integers(0, 9))
def test_merged_ranges_cover_the_ranges_and_only_small_gaps(
    sizes: list[tuple[int, int]], gap: int
) -> None:
    pieces = [(begin, begin + size) for begin, size in sizes]
    result = merge_ranges(pieces, gap)
    needed = {i for begin, end in pieces for i in range(begin, end)}
    read = {i for begin, end in result for i in range(begin, end)}
    assert needed <= read
    edges = list(zip(result, result[1:], strict=False))
    assert all(right[0] - left[1] > gap for left, right in edges)
    extra = sorted(read - needed)
    assert all({i - gap - 1, i + gap + 1} & needed or i - 1 in read for i in extra)


def test_prefetch_covers_what_is_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    reader = CheckpointReader(path)
    piece = Slice("p0", (3,))
    assert reader.prefetch([("fp32", Fragment(piece, 1, 2))]) == 8
    assert reader.prefetch((kind, Fragment(piece, 0, 3)) for kind in KINDS) == 36  # one range
    with pytest.raises(CheckpointError, match="p0: shape"):
        reader.prefetch([("fp32", Fragment(Slice("p0", (4,)), 0, 4))])


def save(tree: dict[str, Any], folder: Path) -> Path:
    run = Run(tree)
    run.train(1, 1)
    return run.save(folder, 1)


def bytes_read(tree: dict[str, Any], path: Path) -> tuple[int, int, int]:
    """Resume on this rank; return the fp32 bytes it holds, bytes read, and bytes prefetched."""
    from hg_scale.checkpoint.local_state import local_states
    from hg_scale.training.state import load_state

    run = Run(tree)
    held = local_states(run.engine.deepspeed, run.engine.slices)
    elements = sum(local.fragment.length for local in held)
    read, ahead = [], []
    original_read, original_prefetch = CheckpointReader.read, CheckpointReader.prefetch

    def counted_read(self: CheckpointReader, kind: str, target: Fragment) -> torch.Tensor:
        read.append(target.length)
        return original_read(self, kind, target)

    def counted_prefetch(self: CheckpointReader, needed: Any) -> int:
        ahead.append(original_prefetch(self, needed))
        return ahead[-1]

    with (
        mock.patch.object(CheckpointReader, "read", counted_read),
        mock.patch.object(CheckpointReader, "prefetch", counted_prefetch),
        mock.patch.object(load, "_MAX_GAP", 0),
    ):
        load_state(run.engine, path)
    return 4 * elements, 4 * sum(read), ahead[0]


@pytest.mark.parametrize("reader", ["1 1 1 zero0", "1 1 2 zero1", "1 1 2 zero3", "2 1 1"])
def test_rank_reads_only_what_it_needs(worlds: Worlds, tmp_path: Path, reader: str) -> None:
    """A rank reads its share of master weights and moments, and its model weights, each once."""
    writer, layout = parse("1 1 1"), parse(reader)
    path = worlds.run(writer.world, save, writer.tree(), tmp_path)[0]
    size = sum(4 * torch.Size(shape).numel() for shape in CheckpointReader(path).shapes.values())
    for held, read, ahead in worlds.run(layout.world, bytes_read, layout.tree(), path):
        if layout.zero == 3:
            assert read == 3 * held
        elif layout.tensor == 1:
            assert read == size + 2 * held
        else:
            assert read == 3 * held < 3 * 0.6 * size
        assert ahead >= read if layout.tensor > 1 else ahead == read
