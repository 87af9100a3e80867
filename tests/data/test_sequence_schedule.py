import json
from dataclasses import asdict

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.sequence_schedule import DataSource, DataState
from tests.data.conftest import TEXT, global_batches, prepare, schedule

TEXTS = [np.random.default_rng(10 + i).bytes(size) for i, size in enumerate((40_000, 9_000))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two corpora of 40,000 and 9,000 training tokens, no 65 of them in both."""
    folder, indexes = tmp_path_factory.mktemp("pair"), []
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text)
        split = (len(text), 0, 0)
        indexes.append(prepare(folder / f"{number}.txt", folder / str(number), split=split))
    return indexes


def mixed(pair, weights=(0.7, 0.3), repeat=(True, True)):
    return [
        DataSource(name, index, weight, again)
        for name, index, weight, again in zip("ab", pair, weights, repeat, strict=True)
    ]


def through_json(state: DataState) -> DataState:
    return DataState(**json.loads(json.dumps(asdict(state))))


def location(ids):
    """(source, first token) of the ids of a sequence."""
    text = ids.astype(np.uint8).tobytes()
    (found,) = [(i, t.find(text)) for i, t in enumerate(TEXTS) if text in t]
    return found


def test_shares_of_two_sources_in_every_layout(pair):
    data = schedule(*mixed(pair))
    locations = data.locate(0, 10_000)
    assert (locations.source == 0).sum() == 7000
    reference = global_batches(data, 40)
    for data_size in (2, 3, 12):
        assert np.array_equal(global_batches(schedule(*mixed(pair)), 40, data_size), reference)
    counts = np.bincount([location(ids)[0] for ids in reference.reshape(-1, 65)])
    assert counts.tolist() == [336, 144]
    epochs = data.epochs(480)
    per_epoch = [order.sequences_per_epoch for order in data.orders]
    assert epochs == {
        "a": pytest.approx(336 / per_epoch[0]),
        "b": pytest.approx(144 / per_epoch[1]),
    }
    assert epochs["b"] > 1


@pytest.mark.parametrize("served", [0, 12, 5000 * 12])
def test_resuming_from_a_state_continues_the_order(pair, served):
    resumed = schedule(*mixed(pair), state=through_json(schedule(*mixed(pair)).state(served, [])))
    expected = schedule(*mixed(pair)).locate(served, 600)
    found = resumed.locate(served, 600)
    assert resumed.first_sequence == served
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert np.array_equal(global_batches(resumed, 10, 4), global_batches(resumed, 10, 1))


def test_source_retires_after_its_first_epoch(pair):
    data = schedule(*mixed(pair, (1, 1), (True, False)))
    limit = data.orders[1].sequences_per_epoch
    locations = data.locate(0, 5 * limit)
    assert (locations.source[: 2 * limit] == 1).sum() == limit
    assert not (locations.source[2 * limit :] == 1).any()
    assert data.sequences is None
    assert data.epochs(5 * limit)["b"] == 1.0


def test_data_ends_when_all_sources_retire(pair):
    data = schedule(*mixed(pair, (1, 1), (False, False)))
    total = sum(order.sequences_per_epoch for order in data.orders)
    assert data.sequences == total
    sequences = global_batches(data, total // 10, 2, batch_size=10).reshape(-1, 65)
    locations = {location(ids) for ids in sequences}
    assert len(locations) == len(sequences) == total // 10 * 10
    with pytest.raises(DataError, match=f"the data ends after {total} sequences of 64 tokens"):
        global_batches(data, total // 10 + 1, batch_size=10)


def count_labels(counts, data, first, count):
    """Add to `counts` (by source, shard and epoch) how often each token is a label."""
    for source, epoch, stream, number in zip(*data.locate(first, count), strict=True):
        order = data.orders[source]
        block = order.block(int(epoch), int(stream), int(number))
        length = order.sequence_length
        start = block.start + int(block.permutation[number - block.first]) * length
        key = int(source), block.shard, int(epoch)
        tokens = data.sources[source].index.split("train").shards[block.shard].tokens
        counts.setdefault(key, np.zeros(tokens, int))[start + 1 : start + 1 + length] += 1


def test_changes_of_length_and_weights_repeat_no_label_within_an_epoch(pair):
    """The run changes three times, then drops a source and takes it back."""
    counts: dict = {}
    data = schedule(*mixed(pair))
    count_labels(counts, data, 0, 300)
    state, consumed = through_json(data.state(300, [])), 300 * 64
    for length, weights, count in (
        (96, (0.7, 0.3), 120),
        (96, (0.2, 0.8), 100),
        (32, (5, 1), 90),
    ):
        data = schedule(*mixed(pair, weights), length=length, state=state)
        assert data.first_sequence == 0 and data.tokens(0) == consumed
        count_labels(counts, data, 0, count)
        state, consumed = through_json(data.state(count, [])), consumed + count * length
    alone = schedule(mixed(pair)[0], length=32, state=state)
    count_labels(counts, alone, 0, 50)
    data = schedule(*mixed(pair), length=32, state=through_json(alone.state(50, [])))
    assert data.new_sources == []
    assert data.tokens(0) == consumed + 50 * 32
    assert data.number_in_run(0) == 300 + 120 + 100 + 90 + 50
    count_labels(counts, data, 0, 60)
    assert max(count.max() for count in counts.values()) == 1


def test_new_weights_continue_each_source_at_its_next_sequence(pair):
    before = schedule(*mixed(pair))
    served = [(before.locate(0, 500).source == i).sum() for i in (0, 1)]
    after = schedule(*mixed(pair, (0.1, 0.9)), state=through_json(before.state(500, [])))
    uninterrupted = schedule(*mixed(pair)).locate(0, 5000)
    resumed = after.locate(0, 500)
    for source in (0, 1):
        expected = [part[uninterrupted.source == source] for part in uninterrupted[1:]]
        found = [part[resumed.source == source] for part in resumed[1:]]
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b[served[source] : served[source] + len(a)])


def test_new_length_resumes_at_the_same_number_of_tokens(index):
    state = through_json(schedule(index).state(700, []))
    assert state.before == {} and state.windows == 700
    other = schedule(index, length=128, state=state, position=700 * 64)
    assert other.first_sequence == 0 and other.tokens(0) == 700 * 64
    assert other.epochs(0)["s0"] == pytest.approx(700 / 1350, abs=0.02)
    same = schedule(index, position=700 * 64)
    assert same.first_sequence == 700


def test_skipped_sequences_are_kept_in_the_state(index):
    state = schedule(index).state(10, [[3, "s0/train-00001.tar"]])
    other = schedule(index, length=32, state=through_json(state))
    assert other.state(4, state.skipped).skipped == [[3, "s0/train-00001.tar"]]


def test_different_tokenizer_is_refused(pair, index):
    other = pair[1].model_copy(
        update={"tokenizer": pair[1].tokenizer.model_copy(update={"vocab_size": 300})}
    )
    other._location = "other"
    with pytest.raises(
        DataError, match=r"other: its tokenizer \(name bytes, vocab_size 300.* differs from"
    ):
        schedule(pair[0], other)
    state = through_json(schedule(other).state(0, []))
    with pytest.raises(
        DataError, match=r"from that of the checkpoint \(name bytes, vocab_size 300"
    ):
        schedule(pair[0], state=state)


def test_new_source_starts_at_its_first_sequence(pair):
    state = through_json(schedule(mixed(pair)[0]).state(100, []))
    data = schedule(*mixed(pair), state=state)
    assert data.new_sources == ["b"]
    assert data.epochs(0)["b"] == 0 < data.epochs(0)["a"]


def documents(index: Index, tokens: int) -> Index:
    """The index of a text as if it were images of `tokens` values."""
    images = index.model_copy(update={"document_tokens": tokens})
    images._location = index.location
    return images


def test_every_image_is_one_sequence(index, text_file, tmp_path):
    folder = tmp_path / "out"
    images = documents(prepare(text_file, folder, split=(96_000, 3000, 0), shard_tokens=2400), 48)
    data = schedule(images, length=48)
    assert data.orders[0].sequences_per_epoch == 2000
    sequences = global_batches(data, 100, 4, batch_size=20).reshape(-1, 49)
    assert not sequences[:, 0].any()  # the input before an image is 0
    found = sorted(TEXT.find(ids[1:].astype(np.uint8).tobytes()) for ids in sequences)
    assert found == list(range(0, 96_000, 48))
    with pytest.raises(DataError, match="does not end with a document of 49 tokens"):
        schedule(documents(images, 49), length=49)
    # Sequences of another length are chunked as in text.
    assert schedule(images, length=24).orders[0].sequences_per_epoch == 40 * 99
