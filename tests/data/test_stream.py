from pathlib import Path

import numpy as np
import pytest

from hg_scale.data import shards as shards_module
from hg_scale.data import stream as stream_module
from hg_scale.data.errors import DataError
from hg_scale.data.order import MAX_STREAMS
from hg_scale.data.stream import TrainingStream
from tests.data.conftest import TEXT, prepare

LENGTH, ROWS, SEED = 64, 12, 7
STEP = LENGTH * ROWS


def make(index, **options):
    settings = {"sequence_length": LENGTH, "global_batch_size": ROWS, "seed": SEED} | options
    return TrainingStream(index, **settings)


def global_batches(index, count, data_size, position=0):
    """Global batches joined from the streams of all ranks."""
    ranks = [
        make(index, data_rank=rank, data_size=data_size, position=position)
        for rank in range(data_size)
    ]
    return [np.concatenate([stream.next_batch() for stream in ranks]) for _ in range(count)]


@pytest.fixture(scope="module")
def reference(index):
    """200 global batches of one rank: nearly two epochs."""
    return global_batches(index, 200, 1)


@pytest.mark.parametrize("data_size", [2, 3, 4, 6, 12])
def test_same_batches_for_every_number_of_ranks(index, reference, data_size):
    assert np.array_equal(global_batches(index, 200, data_size), reference)


@pytest.mark.parametrize("start", [1, 57, 112, 113, 115, 190])
@pytest.mark.parametrize("data_size", [1, 4, 6])
def test_resumes_anywhere_on_any_number_of_ranks(index, reference, start, data_size):
    resumed = global_batches(index, 10, data_size, position=start * STEP)
    assert np.array_equal(resumed, reference[start : start + 10])


def test_an_epoch_covers_the_text_once(index, reference):
    per_epoch = make(index).windows_per_epoch
    assert per_epoch == 30 * (3000 // LENGTH - 1)  # the last shard of 3 tokens gives none
    rows = np.concatenate(reference)[:, 1:].astype(np.uint8)
    found = [TEXT.find(row.tobytes()) for row in rows]
    assert min(found) >= 0
    # Sorting by stream stays within a batch, so an epoch ends in the middle of batch 112.
    inside = sorted(found[: per_epoch // ROWS * ROWS])
    assert np.diff(inside).min() >= LENGTH


def test_position_and_epoch(index):
    stream = make(index, data_rank=1, data_size=3)
    batch = stream.next_batch()
    assert batch.shape == (4, LENGTH + 1) and batch.dtype == np.int64
    assert (stream.position, stream.epoch) == (STEP, 0)
    assert make(index, position=stream.windows_per_epoch * LENGTH).epoch == 1


def test_batch_over_several_epochs(index, text_file, tmp_path):
    small = prepare(text_file, tmp_path / "out", split=(700, 0, 0))
    stream = make(small)
    assert stream.windows_per_epoch == 9
    batch = stream.next_batch()
    assert (stream.epoch, len(batch)) == (1, ROWS)
    assert np.array_equal(batch, global_batches(small, 1, 4)[0])


def test_length_may_change_at_any_position(index):
    stream = make(index, sequence_length=48, position=5 * STEP + 1)
    expected = make(index, sequence_length=48, position=5 * STEP)
    assert np.array_equal(stream.next_batch(), expected.next_batch())


# 30 shards: late in an epoch only the 14 streams with two of them still have windows.
@pytest.mark.parametrize(("step", "streams"), [(0, 16), (100, 14), (10_000, 14)])
def test_a_jump_opens_one_shard_a_stream(index, monkeypatch, step, streams):
    opened = []
    original = shards_module.read_members

    def counted(index, shard, first=0):
        opened.append(shard.file)
        return original(index, shard, first)

    monkeypatch.setattr(shards_module, "read_members", counted)
    make(index, global_batch_size=2 * MAX_STREAMS, position=step * STEP).next_batch()
    assert len(opened) == len(set(opened)) == streams


def test_a_rank_opens_few_streams(index, monkeypatch):
    loads = set()
    original = stream_module._StreamReader._load

    def counted(self, block):
        loads.add(self._stream)
        original(self, block)

    monkeypatch.setattr(stream_module._StreamReader, "_load", counted)
    stream = make(index, global_batch_size=64, data_rank=3, data_size=16)
    for _ in range(5):
        stream.next_batch()
    assert loads == {3}


def test_shards_are_read_front_to_back(index, monkeypatch):
    """An epoch opens every shard once."""
    opened = []
    original = shards_module.read_members
    monkeypatch.setattr(
        shards_module,
        "read_members",
        lambda index, shard, first=0: opened.append(shard.file) or original(index, shard, first),
    )
    stream = make(index, global_batch_size=1)
    for _ in range(stream.windows_per_epoch):
        stream.next_batch()
    assert len(opened) == len(set(opened)) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_size": 5}, "global_batch_size 12 does not divide among 5"),
        ({"position": -1}, "position is -1"),
        ({"sequence_length": 3000}, "needs 3001 tokens in a row.*has 3000.*--shard-tokens"),
    ],
)
def test_refusals(index, options, message):
    with pytest.raises(DataError, match=message):
        make(index, **options)


def test_a_failed_read_leaves_the_position_and_may_be_tried_again(copied):
    stream, expected = make(copied), make(copied)
    for _ in range(3):
        assert np.array_equal(stream.next_batch(), expected.next_batch())
    stream = make(copied, position=3 * STEP)
    path = Path(copied.location, "train-00001.tar")
    content = path.read_bytes()
    path.write_bytes(content[:700])
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-00001\.tar: cannot be read at member"):
            stream.next_batch()
    assert stream.position == 3 * STEP
    path.write_bytes(content)
    assert np.array_equal(stream.next_batch(), expected.next_batch())
