import json
from dataclasses import asdict

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.schedule import DataSource, DataState
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


def place(row):
    """(source, first token) of a row."""
    text = row.astype(np.uint8).tobytes()
    (found,) = [(i, t.find(text)) for i, t in enumerate(TEXTS) if text in t]
    return found


def test_shares_of_two_sources_in_every_layout(pair):
    of = schedule(*mixed(pair))
    places = of.places(0, 10_000)
    assert (places.source == 0).sum() == 7000
    reference = global_batches(of, 40)
    for data_size in (2, 3, 12):
        assert np.array_equal(global_batches(schedule(*mixed(pair)), 40, data_size), reference)
    counts = np.bincount([place(row)[0] for row in reference.reshape(-1, 65)])
    assert counts.tolist() == [336, 144]
    epochs = of.epochs(480)
    wpe = [order.windows_per_epoch for order in of.orders]
    assert epochs == {"a": pytest.approx(336 / wpe[0]), "b": pytest.approx(144 / wpe[1])}
    assert epochs["b"] > 1


@pytest.mark.parametrize("windows", [0, 12, 5000 * 12])
def test_resumes_from_a_state_on_another_layout(pair, windows):
    there = schedule(*mixed(pair), state=through_json(schedule(*mixed(pair)).state(windows, [])))
    whole = schedule(*mixed(pair)).places(windows, 600)
    assert there.begin == windows
    assert all(np.array_equal(a, b) for a, b in zip(there.places(windows, 600), whole, strict=True))
    assert np.array_equal(global_batches(there, 10, 4), global_batches(there, 10, 1))


def test_a_source_retires_after_its_first_pass(pair):
    of = schedule(*mixed(pair, (1, 1), (True, False)))
    limit = of.orders[1].windows_per_epoch
    places = of.places(0, 5 * limit)
    assert (places.source[: 2 * limit] == 1).sum() == limit
    assert not (places.source[2 * limit :] == 1).any()
    assert of.windows is None
    assert of.epochs(5 * limit)["b"] == 1.0


def test_all_sources_retire(pair):
    of = schedule(*mixed(pair, (1, 1), (False, False)))
    total = sum(order.windows_per_epoch for order in of.orders)
    assert of.windows == total
    rows = global_batches(of, total // 10, 2, rows=10).reshape(-1, 65)
    places = [place(row) for row in rows]
    assert len(set(places)) == len(rows) == total // 10 * 10
    with pytest.raises(DataError, match=f"the data ends after {total} windows of 64 tokens"):
        global_batches(of, total // 10 + 1, rows=10)


def labels_served(counts, of, first, count):
    """Add to `counts` (by source, shard and epoch) how often each token is a label."""
    for source, epoch, stream, number in zip(*of.places(first, count), strict=True):
        order = of.orders[source]
        block = order.block(int(epoch), int(stream), int(number))
        length = order.sequence_length
        start = block.start + int(block.windows[number - block.first]) * length
        key = int(source), block.shard, int(epoch)
        tokens = of.sources[source].index.split("train").shards[block.shard].tokens
        counts.setdefault(key, np.zeros(tokens, int))[start + 1 : start + 1 + length] += 1


def test_another_length_and_other_weights_repeat_nothing_within_an_epoch(pair):
    """The run goes on three times with other windows, at last without a source and back."""
    counts: dict = {}
    of = schedule(*mixed(pair))
    labels_served(counts, of, 0, 300)
    state, consumed = through_json(of.state(300, [])), 300 * 64
    for length, weights, windows in (
        (96, (0.7, 0.3), 120),
        (96, (0.2, 0.8), 100),
        (32, (5, 1), 90),
    ):
        of = schedule(*mixed(pair, weights), length=length, state=state)
        assert of.begin == 0 and of.tokens(0) == consumed
        labels_served(counts, of, 0, windows)
        state, consumed = through_json(of.state(windows, [])), consumed + windows * length
    alone = schedule(mixed(pair)[0], length=32, state=state)
    labels_served(counts, alone, 0, 50)
    of = schedule(*mixed(pair), length=32, state=through_json(alone.state(50, [])))
    assert of.new_sources == []
    assert of.tokens(0) == consumed + 50 * 32
    assert of.window_of_run(0) == 300 + 120 + 100 + 90 + 50
    labels_served(counts, of, 0, 60)
    assert max(count.max() for count in counts.values()) == 1


def test_other_weights_at_the_same_length_go_on_exactly(pair):
    """Each source goes on with its next window, whatever the shares."""
    before = schedule(*mixed(pair))
    served = [(before.places(0, 500).source == i).sum() for i in (0, 1)]
    after = schedule(*mixed(pair, (0.1, 0.9)), state=through_json(before.state(500, [])))
    whole = schedule(*mixed(pair)).places(0, 5000)
    there = after.places(0, 500)
    for source in (0, 1):
        mine = [part[whole.source == source] for part in whole[1:]]
        now = [part[there.source == source] for part in there[1:]]
        for a, b in zip(now, mine, strict=True):
            assert np.array_equal(a, b[served[source] : served[source] + len(a)])


def test_another_length_goes_on_where_the_tokens_are(index):
    """One source, no change: the position is the one number that grows."""
    state = through_json(schedule(index).state(700, []))
    assert state.before == {} and state.windows == 700
    other = schedule(index, length=128, state=state, position=700 * 64)
    assert other.begin == 0 and other.tokens(0) == 700 * 64
    assert other.epochs(0)["s0"] == pytest.approx(700 / 1350, abs=0.02)
    same = schedule(index, position=700 * 64)
    assert same.begin == 700


def test_the_ledger_is_kept(index):
    state = schedule(index).state(10, [[3, "s0/train-00001.tar"]])
    other = schedule(index, length=32, state=through_json(state))
    assert other.state(4, state.skipped).skipped == [[3, "s0/train-00001.tar"]]


def test_a_tokenizer_that_differs(pair, index):
    other = pair[1].model_copy(
        update={"tokenizer": pair[1].tokenizer.model_copy(update={"vocab_size": 300})}
    )
    other._location = "there"
    with pytest.raises(
        DataError, match=r"there: its tokenizer name bytes, vocab_size 300.* not tha"
    ):
        schedule(pair[0], other)
    state = through_json(schedule(other).state(0, []))
    with pytest.raises(
        DataError, match="is not that of the checkpoint, name bytes, vocab_size 300"
    ):
        schedule(pair[0], state=state)


def test_data_that_the_run_had_not_seen_begins_at_its_first_window(pair):
    state = through_json(schedule(mixed(pair)[0]).state(100, []))
    of = schedule(*mixed(pair), state=state)
    assert of.new_sources == ["b"]
    assert of.epochs(0)["b"] == 0 < of.epochs(0)["a"]


def documents(index: Index, tokens: int) -> Index:
    """The index of a text, as if it were images of so many values."""
    images = index.model_copy(update={"document_tokens": tokens})
    images._location = index.location
    return images


def test_images_are_served_whole(index, text_file, tmp_path):
    folder = tmp_path / "out"
    images = documents(prepare(text_file, folder, split=(96_000, 3000, 0), shard_tokens=2400), 48)
    of = schedule(images, length=48)
    assert of.orders[0].windows_per_epoch == 2000
    rows = global_batches(of, 100, 4, rows=20).reshape(-1, 49)
    assert not rows[:, 0].any()  # what comes before an image: nothing, 0
    found = sorted(TEXT.find(row[1:].astype(np.uint8).tobytes()) for row in rows)
    assert found == list(range(0, 96_000, 48))
    with pytest.raises(DataError, match="does not end with a document of 49 tokens"):
        schedule(documents(images, 49), length=49)
    # Windows of another length are cut as in text.
    assert schedule(images, length=24).orders[0].windows_per_epoch == 40 * 99
