from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.order import (
    MAX_BLOCK,
    MAX_STREAMS,
    WindowOrder,
    assign_shards,
    draws,
    shuffled,
)

SHARDS = st.lists(st.integers(1, 1500), min_size=1, max_size=40)


def starts_of_epoch(order, epoch):
    """(shard, first token) of every window of an epoch, in the order they are served."""
    first = epoch * order.windows_per_epoch
    places = []
    for e, stream, number in zip(*order.turns(first, order.windows_per_epoch), strict=True):
        assert e == epoch
        block = order.block(epoch, int(stream), int(number))
        assert block.epoch == epoch and 0 <= number - block.first < len(block.windows)
        window = block.windows[number - block.first]
        places.append((block.shard, block.start + int(window) * order.sequence_length))
    return places


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64), st.integers(0, 2**63), st.integers(0, 10**6))
def test_an_epoch_serves_every_window_once(tokens, length, seed, epoch):
    tokens = [*tokens, 2 * length]
    order = WindowOrder(tokens, sequence_length=length, seed=seed)
    places = starts_of_epoch(order, epoch)
    labels = [np.zeros(count, int) for count in tokens]
    for shard, start in places:
        assert start >= 0 and start + length + 1 <= tokens[shard]
        labels[shard][start + 1 : start + length + 1] += 1
    assert all(count.max() <= 1 for count in labels)
    assert len(places) == order.windows_per_epoch
    # What an epoch leaves out of a shard is less than two windows.
    for shard, count in enumerate(labels):
        assert tokens[shard] - count.sum() <= max(2 * length, 1)


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64), st.integers(0, 2**32), st.data())
def test_a_jump_lands_where_counting_does(tokens, length, seed, data):
    order = WindowOrder([*tokens, 500], sequence_length=length, seed=seed)
    total = 2 * order.windows_per_epoch + 3
    whole = np.stack(order.turns(0, total))
    first = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - first))
    fresh = WindowOrder([*tokens, 500], sequence_length=length, seed=seed)
    assert np.array_equal(np.stack(fresh.turns(first, count)), whole[:, first : first + count])


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64))
def test_streams_take_turns_and_advance_one_by_one(tokens, length):
    order = WindowOrder([*tokens, 2 * length], sequence_length=length, seed=5)
    _, streams, numbers = order.turns(0, order.windows_per_epoch)
    for stream in range(order.streams):
        mine = numbers[streams == stream]
        assert np.array_equal(mine, np.arange(len(mine)))
    # Rounds follow each other, and within one the streams come in order.
    assert np.all(np.diff(numbers * MAX_STREAMS + streams) > 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_blocks_are_bounded_and_equal(windows, seed):
    order = WindowOrder([windows + 1], sequence_length=1, seed=seed)
    blocks = {}
    for number in range(order.windows_per_epoch):
        block = order.block(0, 0, number)
        blocks[block.first] = block
    sizes = [len(block.windows) for block in blocks.values()]
    assert sum(sizes) == order.windows_per_epoch
    assert max(sizes) <= MAX_BLOCK and max(sizes) - min(sizes) <= 1
    for block in blocks.values():
        assert sorted(block.windows) == list(range(len(block.windows)))


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 16))
def test_dealt_evenly(tokens, streams):
    hands = assign_shards(np.arange(len(tokens)), np.array(tokens), streams)
    assert sorted(sum(hands, [])) == list(range(len(tokens)))
    totals = [sum(tokens[shard] for shard in hand) for hand in hands]
    assert max(totals) - min(totals) <= max(tokens)


def test_epochs_and_seeds_differ():
    def served(epoch, seed):
        order = WindowOrder([4000] * 32, sequence_length=100, seed=seed)
        return starts_of_epoch(order, epoch)

    assert served(0, 1) == served(0, 1)
    assert served(0, 1) != served(1, 1) and served(0, 1) != served(0, 2)
    # The text is cut at other places too: windows of two epochs hardly ever coincide.
    assert len(set(served(0, 1)) & set(served(1, 1))) < 0.1 * 32 * 39


def test_draws_never_change():
    """A resumed run relies on these very numbers."""
    assert draws(2, 1234, 2, 0, 7).tolist() == [3946906256756926488, 764369208629636658]
    assert shuffled(8, 1234, 0, 3).tolist() == [4, 0, 6, 2, 1, 5, 7, 3]
    order = WindowOrder([1000] * 20, sequence_length=100, seed=1234)
    assert starts_of_epoch(order, 3)[:4] == [(4, 463), (10, 50), (8, 715), (0, 850)]


def test_draws_are_even():
    places = np.array([shuffled(16, seed)[0] for seed in range(4000)])
    assert np.abs(np.bincount(places) / 250 - 1).max() < 0.25


@pytest.mark.parametrize(("tokens", "count"), [(101, 1), (199, 1), (300, 2), (399, 2)])
def test_windows_in_a_shard(tokens, count):
    order = WindowOrder([tokens, 100, 1], sequence_length=100, seed=0)
    assert order.windows_per_epoch == order.first_pass == count


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 20))
def test_an_aligned_epoch_has_every_document(documents, length):
    tokens = [count * length for count in documents]
    order = WindowOrder(tokens, sequence_length=length, seed=3, aligned=True)
    expected = [(s, d * length) for s, count in enumerate(documents) for d in range(count)]
    for epoch in (0, 5):
        assert sorted(starts_of_epoch(order, epoch)) == expected


def cut_labels(order, first, count, labels):
    """Count in `labels` (by epoch, then by shard) what windows first .. first + count predict."""
    for epoch, stream, number in zip(*order.turns(first, count), strict=True):
        block = order.block(int(epoch), int(stream), int(number))
        start = block.start + int(block.windows[number - block.first]) * order.sequence_length
        assert block.start <= start and start + order.sequence_length < block.stop
        labels[int(epoch)][block.shard][start + 1 : start + order.sequence_length + 1] += 1


CUTS = st.lists(st.tuples(st.integers(1, 48), st.integers(0, 200)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(SHARDS, CUTS, st.integers(0, 2**32))
def test_another_length_never_repeats_a_label_in_an_epoch(tokens, cuts, seed):
    """The length changes several times, at any window, then some more windows are served."""
    tokens = [*tokens, 200]
    labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
    order, served = WindowOrder(tokens, sequence_length=7, seed=seed), 0
    for length, windows in cuts:
        order, served = order.recut(served, sequence_length=length), windows
        cut_labels(order, 0, windows, labels)
    cut_labels(order, windows, 100, labels)
    assert all(shard.max() <= 1 for epoch in labels.values() for shard in epoch)


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), st.data())
def test_a_shorter_length_leaves_nothing_out(tokens, length, factor, data):
    """Windows of a divisor: all of the rest of the epoch, but for the ends of the shards."""
    tokens = [*tokens, 200]
    order = WindowOrder(tokens, sequence_length=length * factor, seed=9)
    windows = data.draw(st.integers(0, order.windows_per_epoch))
    labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
    cut_labels(order, 0, windows, labels)
    other = order.recut(windows, sequence_length=length)
    cut_labels(other, 0, other.first_pass, labels)
    if windows < order.windows_per_epoch:
        assert other.first_pass > 0
    for shard, count in enumerate(labels[0]):
        assert count.max() <= 1
        if count.max():  # a shard that was served at all, under either length
            assert tokens[shard] - count.sum() < 2 * length * factor + length


def test_a_longer_length_leaves_out_less_than_the_open_blocks():
    tokens = [3000] * 40
    order = WindowOrder(tokens, sequence_length=10, seed=2)
    for windows in (1, 999, 5000):
        labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
        cut_labels(order, 0, windows, labels)
        other = order.recut(windows, sequence_length=25)
        cut_labels(other, 0, other.first_pass, labels)
        total = sum(int(shard.sum()) for shard in labels[0])
        ends = 40 * 2 * 25
        assert total > sum(tokens) - ends - MAX_STREAMS * MAX_BLOCK * 10
        assert other.epochs(0) == pytest.approx(order.epochs(windows), abs=0.1)
        assert other.epochs(other.first_pass) == 1.0


def test_changing_back_at_once_changes_nothing_that_was_not_begun():
    tokens = [700] * 30
    order = WindowOrder(tokens, sequence_length=10, seed=4)
    there = order.recut(0, sequence_length=20).recut(0, sequence_length=10)
    count = order.windows_per_epoch + 50
    assert np.array_equal(np.stack(order.turns(0, count)), np.stack(there.turns(0, count)))
    assert starts_of_epoch(order, 0) == starts_of_epoch(there, 0)


def test_from_text_to_documents_only_shards_not_begun_are_left():
    order = WindowOrder([120] * 20, sequence_length=7, seed=1)
    aligned = order.recut(16, sequence_length=12, aligned=True)  # one window of each stream
    assert aligned.first_pass == 4 * 10
    back = aligned.recut(4, sequence_length=7)
    assert back.first_pass == 0 and back.turns(0, 1)[0] == [1]


def test_sequence_longer_than_every_shard():
    with pytest.raises(DataError, match=r"sequence_length 100 needs 101 .* longest .* has 100"):
        WindowOrder([100, 20], sequence_length=100, seed=0)


def test_negative_seed():
    with pytest.raises(DataError, match="seed of the data order is -1"):
        WindowOrder([1000], sequence_length=10, seed=-1)
