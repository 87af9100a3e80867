import threading
import time

import numpy as np
import pytest

from hg_scale.data.blocks import BlockRequest
from hg_scale.data.errors import DataError
from hg_scale.data.prefetch import BlockKey, BlockLoader
from hg_scale.data.shards import LoadedTokens
from tests.data.conftest import schedule, stream


class SlowReader:
    """A reader that sleeps, records its requests, and fails at the given starts."""

    def __init__(self, seconds=0.0, fails=()):
        self.requests, self._seconds, self._fails = [], seconds, fails

    def read(self, request):
        time.sleep(self._seconds)
        self.requests.append(request)
        if request.start in self._fails:
            raise DataError("shard: missing")
        return LoadedTokens(np.full(3, request.start), [])

    def close(self):
        pass


def request_block(loader, number, stream=0, size=10):
    request = BlockRequest((0, stream), None, number, number + 1)  # type: ignore[arg-type]
    key = BlockKey(0, 0, stream, number)
    loader.request(key, request, size)
    return key


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-reader")]


def test_slot_stays_with_one_reader_and_in_order():
    readers = [SlowReader(), SlowReader(), SlowReader()]
    loader = BlockLoader(readers)
    keys = [request_block(loader, number, stream) for number in range(5) for stream in range(6)]
    assert [loader.get(key)[0].tokens[0] for key in keys] == [n for n in range(5) for _ in range(6)]
    for i, reader in enumerate(readers):
        assert {request.slot[1] for request in reader.requests} == {i, i + 3}
        for slot in (i, i + 3):
            starts = [request.start for request in reader.requests if request.slot[1] == slot]
            assert starts == list(range(5))
    loader.close()
    assert not threads()


def test_bytes_held_are_counted():
    loader = BlockLoader([SlowReader()])
    keys = [request_block(loader, number, size=7) for number in range(3)]
    assert loader.bytes_held == 21
    loader.drop(keys[0])
    assert loader.bytes_held == 14
    loader.close()


def test_reader_errors_are_raised_by_get():
    loader = BlockLoader([SlowReader(fails=(1,))])
    keys = [request_block(loader, number) for number in range(3)]
    assert loader.get(keys[2])[0].tokens[0] == 2
    with pytest.raises(DataError, match="shard: missing"):
        loader.get(keys[1])
    loader.close()


def test_wait_is_measured():
    loader = BlockLoader([SlowReader(0.2)])
    first, second = request_block(loader, 0), request_block(loader, 1)
    assert loader.get(first)[1] > 0.1
    time.sleep(0.5)
    assert loader.get(second)[1] == 0.0
    loader.close()


def test_closing_ends_threads_and_cancels_requests(index):
    slow = SlowReader(0.05)
    loader = BlockLoader([slow])
    for number in range(1000):
        request_block(loader, number)
    loader.close()
    loader.close()
    assert not threads() and len(slow.requests) < 1000
    with stream(schedule(index)) as training:
        training.next_batch()
    assert not threads()
