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
from hg_scale.data.schedule import DataState
from hg_scale.data.shards import RetryPolicy
from tests.data.conftest import TEXT, global_batches, prepare, schedule, stream
from tests.data.servers import serve

LENGTH, ROWS = 64, 12
STEP = LENGTH * ROWS
DATA_SIZES = [1, 2, 3, 4, 6, 8, 12]
NEXT = {0: 1, 1: 3, 3: 0}  # another number of workers


class Shared:
    """A reader that outlives the streams that it serves."""

    def __init__(self, reader):
        self.read = reader.read

    def close(self):
        pass


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """400,000 tokens in 25 shards: 24,000 windows are about four epochs."""
    source = tmp_path_factory.mktemp("large") / "text"
    source.write_bytes(np.random.default_rng(3).bytes(410_000))
    folder = tmp_path_factory.mktemp("large") / "shards"
    return prepare(source, folder, split=(400_000, 5000, 5000), chunk_tokens=4096,
                   shard_tokens=16_384)  # fmt: skip


@pytest.fixture(scope="module")
def thousand(large):
    """The first 1,000 global batches of 24, by one rank without processes."""
    return global_batches(schedule(large), 1000, rows=24)


@pytest.fixture(scope="module")
def worker_pools():
    """1 and 3 processes, which serve all layouts in turn."""
    pools = {workers: make_readers(workers, RetryPolicy()) for workers in (1, 3)}
    yield {0: None} | {w: [Shared(reader) for reader in pool] for w, pool in pools.items()}
    for pool in pools.values():
        for reader in pool:
            reader.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("data_size", DATA_SIZES)
def test_same_global_batches_in_every_layout(large, thousand, worker_pools, data_size, workers):
    readers = worker_pools[workers]
    found = global_batches(schedule(large), 1000, data_size, rows=24, readers=readers)
    assert found.tobytes() == thousand.tobytes()


@pytest.mark.parametrize(("start", "data_size", "workers"), [
    (137, 8, 0), (137, 3, 1), (500, 12, 3), (500, 1, 0), (999, 2, 3), (999, 6, 0),
])  # fmt: skip
def test_resumes_anywhere_on_any_layout(large, thousand, worker_pools, start, data_size, workers):
    state = schedule(large).state(start * 24, [])
    found = global_batches(
        schedule(large, state=state), min(30, 1000 - start), data_size, rows=24,
        readers=worker_pools[workers],
    )  # fmt: skip
    assert found.tobytes() == thousand[start : start + 30].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [137, 500, 999])
@pytest.mark.parametrize("data_size", DATA_SIZES)
def test_every_layout_hands_over_to_another(
    large, thousand, worker_pools, data_size, start, workers
):
    """Read up to `start`, saved as a checkpoint saves it, the rest on the next DP size."""
    readers = worker_pools[workers]
    before = schedule(large)
    first = global_batches(before, start, data_size, rows=24, readers=readers)
    saved = json.loads(json.dumps(asdict(before.state(start * 24, []))))
    other = DATA_SIZES[(DATA_SIZES.index(data_size) + 3) % len(DATA_SIZES)]
    after = schedule(large, state=DataState(**saved))
    rest = global_batches(after, 1000 - start, other, rows=24, readers=worker_pools[NEXT[workers]])
    assert first.tobytes() + rest.tobytes() == thousand.tobytes()


@pytest.mark.parametrize("prefetch", [0, 1, 10_000, 10**9])
def test_any_prefetch_gives_the_same(large, thousand, prefetch):
    found = global_batches(schedule(large), 200, 2, rows=24, prefetch_bytes=prefetch)
    assert np.array_equal(found, thousand[:200])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("scheme", ["pipe", "http"])
def test_the_same_from_elsewhere(index, worker_pools, scheme, workers):
    readers, expected = worker_pools[workers], global_batches(schedule(index), 100, 2)
    with serve(index.location) as (url, asked):
        where = url if scheme == "http" else f"pipe:cat {index.location}/{{}}"
        found = global_batches(schedule(read_index(where)), 100, 2, readers=readers)
    assert np.array_equal(found, expected)
    assert (len(asked) > 10) == (scheme == "http")


def test_an_epoch_serves_every_window_once(index):
    of = schedule(index)
    per_epoch = of.orders[0].windows_per_epoch
    assert per_epoch == 30 * (3000 // LENGTH - 1)  # the last shard of 3 tokens gives none
    rows = global_batches(of, per_epoch // 10, 5, rows=10)
    found = [TEXT.find(row[1:].astype(np.uint8).tobytes()) for row in rows.reshape(-1, LENGTH + 1)]
    assert len(found) == per_epoch and min(found) >= 0
    assert np.diff(sorted(found)).min() >= LENGTH


def test_inputs_are_the_tokens_before_their_labels(index):
    for row in global_batches(schedule(index), 20)[:, 0].astype(np.uint8):
        assert row.tobytes() in TEXT


def test_batch_over_several_epochs(text_file, tmp_path):
    small = prepare(text_file, tmp_path / "out", split=(700, 0, 0))
    of = schedule(small)
    assert of.orders[0].windows_per_epoch == 9
    assert of.epochs(12) == {"s0": pytest.approx(12 / 9)}
    assert np.array_equal(global_batches(of, 5), global_batches(of, 5, 4))


@pytest.fixture
def opened(monkeypatch):
    """The shards opened, in order."""
    names = []
    original = shards_module._Archive.__init__

    def counted(self, file, number, timeout):
        names.append(file.name)
        original(self, file, number, timeout)

    monkeypatch.setattr(shards_module._Archive, "__init__", counted)
    return names


@pytest.mark.parametrize("step", [0, 100, 10_000])
def test_a_jump_opens_at_most_one_shard_a_stream(index, opened, step):
    of = schedule(index, position=step * STEP)
    with stream(of, rows=2 * MAX_STREAMS, batches=1) as jumped:
        jumped.next_batch()
    assert len(opened) == len(set(opened)) <= MAX_STREAMS


def test_a_rank_opens_few_streams(index, opened):
    with stream(schedule(index), rows=64, data_rank=3, data_size=16, batches=5) as rank:
        for _ in range(5):
            rank.next_batch()
    assert len(set(opened)) == 1


def test_shards_are_read_front_to_back(index, opened):
    """An epoch opens every shard once."""
    of = schedule(index)
    count = of.orders[0].windows_per_epoch
    with stream(of, rows=1, batches=count) as alone:
        for _ in range(count):
            alone.next_batch()
    assert len(opened) == len(set(opened)) == 30


def test_no_more_is_read_than_announced(index):
    with stream(schedule(index), batches=2) as two:
        for _ in range(2):
            two.next_batch()
        with pytest.raises(DataError, match="no more batches"):
            two.next_batch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_size": 5}, "global_batch_size 12 does not divide among 5"),
        ({"position": -1}, "position is -1"),
        ({"length": 3000}, "needs 3001 tokens in a row.*has 3000.*--shard-tokens"),
    ],
)
def test_refusals(index, options, message):
    where = {key: options.pop(key) for key in ("position", "length") if key in options}
    with pytest.raises(DataError, match=message):
        stream(schedule(index, **where), **options)


def windows_of(batches):
    """Every row of the global batches with its place."""
    return batches.reshape(-1, batches.shape[-1])


@pytest.mark.parametrize("data_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_member_masks_its_windows_and_shifts_nothing(copied, data_size, workers):
    """The windows that touch it are without tokens; all others are as they were."""
    whole = windows_of(global_batches(schedule(copied), 30))
    path = Path(copied.location, "train-00001.tar")
    content = bytearray(path.read_bytes())
    offset = copied.splits["train"].shards[1].members.offsets[2]
    content[offset + 700] ^= 1
    path.write_bytes(content)
    bad_text = TEXT[3000 + 1024 : 3000 + 1536]
    ranks = [
        stream(schedule(copied), workers, data_rank=rank, data_size=data_size, batches=30)
        for rank in range(data_size)
    ]
    rows, messages = [], []
    for _ in range(30):
        for rank in ranks:
            batch = rank.next_batch()
            for row in range(len(batch.ids)):
                assert (row in batch.faults) == (batch.ids[row] == -1).all()
            rows += list(batch.ids)
            messages += list(batch.faults.values())
    for rank in ranks:
        rank.close()
    masked = 0
    for row, expected in zip(rows, whole, strict=True):
        text = expected.astype(np.uint8).tobytes()
        place = TEXT.find(text)
        touches = place < 3000 + 1536 and place + len(text) > 3000 + 1024
        masked += touches
        assert np.array_equal(row, np.full_like(row, -1) if touches else expected)
    assert masked == len(messages) > 0 and bad_text
    assert all("train-00001.tar: member 2: the checksum differs" in m for m in messages)


def test_a_missing_shard_masks_all_its_windows(copied):
    whole = windows_of(global_batches(schedule(copied), 11))
    Path(copied.location, "train-00002.tar").unlink()
    found = windows_of(global_batches(schedule(copied), 11))
    gone = [TEXT.find(row.astype(np.uint8).tobytes()) // 3000 == 2 for row in whole]
    assert 0 < sum(gone) < len(gone)
    assert np.array_equal((found == -1).all(1), gone)
    assert np.array_equal(found[~np.array(gone)], whole[~np.array(gone)])
