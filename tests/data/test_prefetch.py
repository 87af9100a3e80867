import threading
import time

import numpy as np
import pytest

from hg_scale.data.blocks import Request
from hg_scale.data.errors import DataError
from hg_scale.data.prefetch import BlockKey, BlockLoader
from hg_scale.data.shards import Loaded
from tests.data.conftest import schedule, stream


class Slow:
    """A reader that takes its time, knows what it was asked for, and fails at times."""

    def __init__(self, seconds=0.0, fails=()):
        self.asked, self._seconds, self._fails = [], seconds, fails

    def read(self, request):
        time.sleep(self._seconds)
        self.asked.append(request)
        if request.start in self._fails:
            raise DataError("shard: gone")
        return Loaded(np.full(3, request.start), [])

    def close(self):
        pass


def ask(loader, number, stream=0, size=10):
    request = Request((0, stream), None, number, number + 1)  # type: ignore[arg-type]
    key = BlockKey(0, 0, stream, number)
    loader.ask(key, request, size)
    return key


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-reader")]


def test_a_slot_stays_with_one_reader_and_in_order():
    readers = [Slow(), Slow(), Slow()]
    loader = BlockLoader(readers)
    keys = [ask(loader, number, stream) for number in range(5) for stream in range(6)]
    assert [loader.get(key)[0].tokens[0] for key in keys] == [n for n in range(5) for _ in range(6)]
    for place, reader in enumerate(readers):
        assert {request.slot[1] for request in reader.asked} == {place, place + 3}
        for slot in (place, place + 3):
            mine = [request.start for request in reader.asked if request.slot[1] == slot]
            assert mine == list(range(5))
    loader.close()
    assert not threads()


def test_bytes_held_are_counted():
    loader = BlockLoader([Slow()])
    keys = [ask(loader, number, size=7) for number in range(3)]
    assert loader.held == 21
    loader.drop(keys[0])
    assert loader.held == 14
    loader.close()


def test_failures_reach_whoever_needs_the_block():
    loader = BlockLoader([Slow(fails=(1,))])
    keys = [ask(loader, number) for number in range(3)]
    assert loader.get(keys[2])[0].tokens[0] == 2
    with pytest.raises(DataError, match="shard: gone"):
        loader.get(keys[1])
    loader.close()


def test_waiting_is_measured():
    loader = BlockLoader([Slow(0.2)])
    first, second = ask(loader, 0), ask(loader, 1)
    assert loader.get(first)[1] > 0.1
    time.sleep(0.5)
    assert loader.get(second)[1] == 0.0
    loader.close()


def test_closing_leaves_no_thread_and_does_not_load_the_rest(index):
    slow = Slow(0.05)
    loader = BlockLoader([slow])
    for number in range(1000):
        ask(loader, number)
    loader.close()
    loader.close()
    assert not threads() and len(slow.asked) < 1000
    with stream(schedule(index)) as begun:
        begun.next_batch()
    assert not threads()
