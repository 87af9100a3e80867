from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.order import (
    MAX_BLOCK,
    MAX_STREAMS,
    SequenceOrder,
    assign_shards,
    random_permutation,
    random_uint64,
)

SHARDS = st.lists(st.integers(1, 1500), min_size=1, max_size=40)


def starts_of_epoch(order, epoch):
    """(shard, first token) of every sequence of an epoch, in the order they are served."""
    first = epoch * order.sequences_per_epoch
    starts = []
    for e, stream, number in zip(*order.locate(first, order.sequences_per_epoch), strict=True):
        assert e == epoch
        block = order.block(epoch, int(stream), int(number))
        assert block.epoch == epoch and 0 <= number - block.first < len(block.permutation)
        sequence = block.permutation[number - block.first]
        starts.append((block.shard, block.start + int(sequence) * order.sequence_length))
    return starts


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64), st.integers(0, 2**63), st.integers(0, 10**6))
def test_epoch_serves_every_sequence_once(tokens, length, seed, epoch):
    tokens = [*tokens, 2 * length]
    order = SequenceOrder(tokens, sequence_length=length, seed=seed)
    starts = starts_of_epoch(order, epoch)
    labels = [np.zeros(count, int) for count in tokens]
    for shard, start in starts:
        assert start >= 0 and start + length + 1 <= tokens[shard]
        labels[shard][start + 1 : start + length + 1] += 1
    assert all(count.max() <= 1 for count in labels)
    assert len(starts) == order.sequences_per_epoch
    # An epoch leaves out less than two sequences of a shard.
    for shard, count in enumerate(labels):
        assert tokens[shard] - count.sum() <= max(2 * length, 1)


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64), st.integers(0, 2**32), st.data())
def test_locate_equals_counting_from_the_start(tokens, length, seed, data):
    order = SequenceOrder([*tokens, 500], sequence_length=length, seed=seed)
    total = 2 * order.sequences_per_epoch + 3
    located = np.stack(order.locate(0, total))
    first = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - first))
    fresh = SequenceOrder([*tokens, 500], sequence_length=length, seed=seed)
    assert np.array_equal(np.stack(fresh.locate(first, count)), located[:, first : first + count])


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 64))
def test_streams_alternate_and_advance_one_by_one(tokens, length):
    order = SequenceOrder([*tokens, 2 * length], sequence_length=length, seed=5)
    _, streams, numbers = order.locate(0, order.sequences_per_epoch)
    for stream in range(order.streams):
        own = numbers[streams == stream]
        assert np.array_equal(own, np.arange(len(own)))
    # Rounds follow each other, and within one the streams come in order.
    assert np.all(np.diff(numbers * MAX_STREAMS + streams) > 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_blocks_are_bounded_and_of_equal_size(sequences, seed):
    order = SequenceOrder([sequences + 1], sequence_length=1, seed=seed)
    blocks = {}
    for number in range(order.sequences_per_epoch):
        block = order.block(0, 0, number)
        blocks[block.first] = block
    sizes = [len(block.permutation) for block in blocks.values()]
    assert sum(sizes) == order.sequences_per_epoch
    assert max(sizes) <= MAX_BLOCK and max(sizes) - min(sizes) <= 1
    for block in blocks.values():
        assert sorted(block.permutation) == list(range(len(block.permutation)))


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 16))
def test_shards_are_assigned_evenly(tokens, streams):
    assigned = assign_shards(np.arange(len(tokens)), np.array(tokens), streams)
    assert sorted(sum(assigned, [])) == list(range(len(tokens)))
    totals = [sum(tokens[shard] for shard in shards) for shards in assigned]
    assert max(totals) - min(totals) <= max(tokens)


def test_order_differs_between_epochs_and_seeds():
    def served(epoch, seed):
        order = SequenceOrder([4000] * 32, sequence_length=100, seed=seed)
        return starts_of_epoch(order, epoch)

    assert served(0, 1) == served(0, 1)
    assert served(0, 1) != served(1, 1) and served(0, 1) != served(0, 2)
    # The offsets differ too: sequences of two epochs hardly ever coincide.
    assert len(set(served(0, 1)) & set(served(1, 1))) < 0.1 * 32 * 39


def test_random_numbers_never_change():
    """Resuming a run relies on exactly these numbers."""
    assert random_uint64(2, 1234, 2, 0, 7).tolist() == [3946906256756926488, 764369208629636658]
    assert random_permutation(8, 1234, 0, 3).tolist() == [4, 0, 6, 2, 1, 5, 7, 3]
    order = SequenceOrder([1000] * 20, sequence_length=100, seed=1234)
    assert starts_of_epoch(order, 3)[:4] == [(4, 463), (10, 50), (8, 715), (0, 850)]


def test_permutations_are_uniform():
    first = np.array([random_permutation(16, seed)[0] for seed in range(4000)])
    assert np.abs(np.bincount(first) / 250 - 1).max() < 0.25


@pytest.mark.parametrize(("tokens", "count"), [(101, 1), (199, 1), (300, 2), (399, 2)])
def test_number_of_sequences_of_a_shard(tokens, count):
    order = SequenceOrder([tokens, 100, 1], sequence_length=100, seed=0)
    assert order.sequences_per_epoch == order.first_epoch_sequences == count


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 20))
def test_aligned_epoch_serves_every_document(documents, length):
    tokens = [count * length for count in documents]
    order = SequenceOrder(tokens, sequence_length=length, seed=3, aligned=True)
    expected = [(s, d * length) for s, count in enumerate(documents) for d in range(count)]
    for epoch in (0, 5):
        assert sorted(starts_of_epoch(order, epoch)) == expected


def count_labels(order, first, count, labels):
    """Count in `labels` (by epoch, then by shard) the labels of `count` sequences from `first`."""
    for epoch, stream, number in zip(*order.locate(first, count), strict=True):
        block = order.block(int(epoch), int(stream), int(number))
        start = block.start + int(block.permutation[number - block.first]) * order.sequence_length
        assert block.start <= start and start + order.sequence_length < block.stop
        labels[int(epoch)][block.shard][start + 1 : start + order.sequence_length + 1] += 1


CHANGES = st.lists(st.tuples(st.integers(1, 48), st.integers(0, 200)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(SHARDS, CHANGES, st.integers(0, 2**32))
def test_changing_the_length_never_repeats_a_label_in_an_epoch(tokens, changes, seed):
    """The length changes several times, at any sequence, then more sequences are served."""
    tokens = [*tokens, 200]
    labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
    order, served = SequenceOrder(tokens, sequence_length=7, seed=seed), 0
    for length, count in changes:
        order, served = order.rechunk(served, sequence_length=length), count
        count_labels(order, 0, count, labels)
    count_labels(order, count, 100, labels)
    assert all(shard.max() <= 1 for epoch in labels.values() for shard in epoch)


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), st.data())
def test_shorter_length_serves_the_rest_of_the_epoch(tokens, length, factor, data):
    """For a divisor of the length: all of it but the ends of the shards."""
    tokens = [*tokens, 200]
    order = SequenceOrder(tokens, sequence_length=length * factor, seed=9)
    served = data.draw(st.integers(0, order.sequences_per_epoch))
    labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
    count_labels(order, 0, served, labels)
    other = order.rechunk(served, sequence_length=length)
    count_labels(other, 0, other.first_epoch_sequences, labels)
    if served < order.sequences_per_epoch:
        assert other.first_epoch_sequences > 0
    for shard, count in enumerate(labels[0]):
        assert count.max() <= 1
        if count.max():  # a shard that was served at all, under either length
            assert tokens[shard] - count.sum() < 2 * length * factor + length


def test_longer_length_leaves_out_less_than_the_current_blocks():
    tokens = [3000] * 40
    order = SequenceOrder(tokens, sequence_length=10, seed=2)
    for served in (1, 999, 5000):
        labels = defaultdict(lambda: [np.zeros(count, int) for count in tokens])
        count_labels(order, 0, served, labels)
        other = order.rechunk(served, sequence_length=25)
        count_labels(other, 0, other.first_epoch_sequences, labels)
        total = sum(int(shard.sum()) for shard in labels[0])
        ends = 40 * 2 * 25
        assert total > sum(tokens) - ends - MAX_STREAMS * MAX_BLOCK * 10
        assert other.epochs(0) == pytest.approx(order.epochs(served), abs=0.1)
        assert other.epochs(other.first_epoch_sequences) == 1.0


def test_changing_the_length_and_back_restores_the_order():
    tokens = [700] * 30
    order = SequenceOrder(tokens, sequence_length=10, seed=4)
    back = order.rechunk(0, sequence_length=20).rechunk(0, sequence_length=10)
    count = order.sequences_per_epoch + 50
    assert np.array_equal(np.stack(order.locate(0, count)), np.stack(back.locate(0, count)))
    assert starts_of_epoch(order, 0) == starts_of_epoch(back, 0)


def test_change_to_aligned_documents_leaves_out_partly_served_shards():
    order = SequenceOrder([120] * 20, sequence_length=7, seed=1)
    aligned = order.rechunk(16, sequence_length=12, aligned=True)  # one sequence of each stream
    assert aligned.first_epoch_sequences == 4 * 10
    back = aligned.rechunk(4, sequence_length=7)
    assert back.first_epoch_sequences == 0 and back.locate(0, 1)[0] == [1]


def test_sequence_longer_than_every_shard_is_refused():
    with pytest.raises(DataError, match=r"sequence_length 100 needs 101 .* longest .* has 100"):
        SequenceOrder([100, 20], sequence_length=100, seed=0)


def test_negative_seed_is_refused():
    with pytest.raises(DataError, match="seed of the data order is -1"):
        SequenceOrder([1000], sequence_length=10, seed=-1)
