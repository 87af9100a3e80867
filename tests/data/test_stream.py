import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hg_scale.data import shards as shards_module
from hg_scale.data.blocks import make_readers
from hg_scale.data.errors import DataError
from hg_scale.data.index import read_index
from hg_scale.data.order import MAX_STREAMS
from hg_scale.data.sequence_schedule import DataState
from hg_scale.data.shards import RetryPolicy
from tests.data.conftest import TEXT, global_batches, prepare, schedule, stream
from tests.data.servers import serve

LENGTH, BATCH_SIZE = 64, 12
DATA_SIZES = [1, 2, 3, 4, 6, 8, 12]
OTHER_WORKERS = {0: 1, 1: 3, 3: 0}


class SharedReader:
    """A reader that is not closed by the streams that use it."""

    def __init__(self, reader):
        self.read = reader.read

    def close(self):
        pass


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """400,000 tokens in 25 shards: 24,000 sequences are about four epochs."""
    source = tmp_path_factory.mktemp("large") / "text"
    source.write_bytes(np.random.default_rng(3).bytes(410_000))
    folder = tmp_path_factory.mktemp("large") / "shards"
    return prepare(source, folder, split=(400_000, 5000, 5000), chunk_tokens=4096,
                   shard_tokens=16_384)  # fmt: skip


@pytest.fixture(scope="module")
def thousand(large):
    """The first 1,000 global batches of 24, read by one rank without workers."""
    return global_batches(schedule(large), 1000, batch_size=24)


@pytest.fixture(scope="module")
def worker_pools():
    """1 and 3 worker processes, shared by the tests of all layouts."""
    pools = {workers: make_readers(workers, RetryPolicy()) for workers in (1, 3)}
    yield {0: None} | {w: [SharedReader(reader) for reader in pool] for w, pool in pools.items()}
    for pool in pools.values():
        for reader in pool:
            reader.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("data_size", DATA_SIZES)
def test_same_global_batches_in_every_layout(large, thousand, worker_pools, data_size, workers):
    readers = worker_pools[workers]
    found = global_batches(schedule(large), 1000, data_size, batch_size=24, readers=readers)
    assert found.tobytes() == thousand.tobytes()


@pytest.mark.parametrize(("start", "data_size", "workers"), [
    (137, 8, 0), (137, 3, 1), (500, 12, 3), (500, 1, 0), (999, 2, 3), (999, 6, 0),
])  # fmt: skip
def test_resuming_anywhere_in_any_layout_continues_the_batches(
    large, thousand, worker_pools, start, data_size, workers
):
    state = schedule(large).state(start * 24, [])
    found = global_batches(
        schedule(large, state=state), min(30, 1000 - start), data_size, batch_size=24,
        readers=worker_pools[workers],
    )  # fmt: skip
    assert found.tobytes() == thousand[start : start + 30].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [137, 500, 999])
@pytest.mark.parametrize("data_size", DATA_SIZES)
def test_batches_continue_after_a_change_of_layout(
    large, thousand, worker_pools, data_size, start, workers
):
    """Read up to `start`, save the state as a checkpoint does, read the rest with another size."""
    readers = worker_pools[workers]
    before = schedule(large)
    first = global_batches(before, start, data_size, batch_size=24, readers=readers)
    saved = json.loads(json.dumps(asdict(before.state(start * 24, []))))
    other = DATA_SIZES[(DATA_SIZES.index(data_size) + 3) % len(DATA_SIZES)]
    after = schedule(large, state=DataState(**saved))
    rest = global_batches(
        after, 1000 - start, other, batch_size=24, readers=worker_pools[OTHER_WORKERS[workers]]
    )
    assert first.tobytes() + rest.tobytes() == thousand.tobytes()


@pytest.mark.parametrize("prefetch", [0, 1, 10_000, 10**9])
def test_prefetch_does_not_change_the_batches(large, thousand, prefetch):
    found = global_batches(schedule(large), 200, 2, batch_size=24, prefetch_bytes=prefetch)
    assert np.array_equal(found, thousand[:200])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("scheme", ["pipe", "http"])
def test_remote_shards_give_the_same_batches(index, worker_pools, scheme, workers):
    readers, expected = worker_pools[workers], global_batches(schedule(index), 100, 2)
    with serve(index.location) as (url, requests):
        location = url if scheme == "http" else f"pipe:cat {index.location}/{{}}"
        found = global_batches(schedule(read_index(location)), 100, 2, readers=readers)
    assert np.array_equal(found, expected)
    assert (len(requests) > 10) == (scheme == "http")


def test_epoch_serves_every_sequence_once(index):
    data = schedule(index)
    per_epoch = data.orders[0].sequences_per_epoch
    assert per_epoch == 30 * (3000 // LENGTH - 1)  # the last shard has 3 tokens: none
    batches = global_batches(data, per_epoch // 10, 5, batch_size=10)
    sequences = batches[..., 1:].reshape(-1, LENGTH).astype(np.uint8)
    found = [TEXT.find(labels.tobytes()) for labels in sequences]
    assert len(found) == per_epoch and min(found) >= 0
    assert np.diff(sorted(found)).min() >= LENGTH


def test_sequences_are_contiguous_text(index):
    for ids in global_batches(schedule(index), 20)[:, 0].astype(np.uint8):
        assert ids.tobytes() in TEXT


def test_batch_can_span_several_epochs(text_file, tmp_path):
    small = prepare(text_file, tmp_path / "out", split=(700, 0, 0))
    data = schedule(small)
    assert data.orders[0].sequences_per_epoch == 9
    assert data.epochs(12) == {"s0": pytest.approx(12 / 9)}
    assert np.array_equal(global_batches(data, 5), global_batches(data, 5, 4))


@pytest.fixture
def opened(monkeypatch):
    """The names of the shards opened, in order."""
    names = []
    original = shards_module._Archive.__init__

    def record(self, file, number, timeout):
        names.append(file.name)
        original(self, file, number, timeout)

    monkeypatch.setattr(shards_module._Archive, "__init__", record)
    return names


@pytest.mark.parametrize("step", [0, 100, 10_000])
def test_jump_opens_at_most_one_shard_per_stream(index, opened, step):
    data = schedule(index, position=step * LENGTH * BATCH_SIZE)
    with stream(data, batch_size=2 * MAX_STREAMS, batches=1) as training:
        training.next_batch()
    assert len(opened) == len(set(opened)) <= MAX_STREAMS


def test_rank_reads_few_streams(index, opened):
    with stream(schedule(index), batch_size=64, data_rank=3, data_size=16, batches=5) as training:
        for _ in range(5):
            training.next_batch()
    assert len(set(opened)) == 1


def test_epoch_opens_every_shard_once(index, opened):
    data = schedule(index)
    count = data.orders[0].sequences_per_epoch
    with stream(data, batch_size=1, batches=count) as training:
        for _ in range(count):
            training.next_batch()
    assert len(opened) == len(set(opened)) == 30


def test_reading_more_batches_than_announced_is_refused(index):
    with stream(schedule(index), batches=2) as training:
        for _ in range(2):
            training.next_batch()
        with pytest.raises(DataError, match="no more batches"):
            training.next_batch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_size": 5}, "global_batch_size 12 does not divide among 5"),
        ({"position": -1}, "position is -1"),
        ({"length": 3000}, "needs 3001 tokens in a row.*has 3000.*--shard-tokens"),
    ],
)
def test_invalid_options_are_refused(index, options, message):
    of_schedule = {key: options.pop(key) for key in ("position", "length") if key in options}
    with pytest.raises(DataError, match=message):
        stream(schedule(index, **of_schedule), **options)


def sequences_of(batches):
    """All sequences of the global batches, (n, L + 1)."""
    return batches.reshape(-1, batches.shape[-1])


@pytest.mark.parametrize("data_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_member_masks_its_sequences_and_shifts_nothing(writable, data_size, workers):
    """The sequences that overlap it have no tokens; all others are unchanged."""
    intact = sequences_of(global_batches(schedule(writable), 30))
    path = Path(writable.location, "train-00001.tar")
    content = bytearray(path.read_bytes())
    offset = writable.splits["train"].shards[1].members.offsets[2]
    content[offset + 700] ^= 1
    path.write_bytes(content)
    ranks = [
        stream(schedule(writable), workers, data_rank=rank, data_size=data_size, batches=30)
        for rank in range(data_size)
    ]
    found, messages = [], []
    for _ in range(30):
        for rank in ranks:
            batch = rank.next_batch()
            for i in range(len(batch.ids)):
                assert (i in batch.errors) == (batch.ids[i] == -1).all()
            found += list(batch.ids)
            messages += list(batch.errors.values())
    for rank in ranks:
        rank.close()
    masked = 0
    for ids, expected in zip(found, intact, strict=True):
        text = expected.astype(np.uint8).tobytes()
        start = TEXT.find(text)
        overlaps = start < 3000 + 1536 and start + len(text) > 3000 + 1024
        masked += overlaps
        assert np.array_equal(ids, np.full_like(ids, -1) if overlaps else expected)
    assert masked == len(messages) > 0
    assert all("train-00001.tar: member 2: the checksum differs" in m for m in messages)


def test_missing_shard_masks_all_its_sequences(writable):
    intact = sequences_of(global_batches(schedule(writable), 11))
    Path(writable.location, "train-00002.tar").unlink()
    found = sequences_of(global_batches(schedule(writable), 11))
    starts = np.array([TEXT.find(ids.astype(np.uint8).tobytes()) for ids in intact])
    missing = starts // 3000 == 2
    assert 0 < missing.sum() < len(missing)
    assert np.array_equal((found == -1).all(1), missing)
    assert np.array_equal(found[~missing], intact[~missing])
