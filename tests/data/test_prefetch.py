import threading
import time

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.prefetch import Prefetcher
from hg_scale.data.stream import TrainingStream


def make(index):
    return TrainingStream(index, sequence_length=64, global_batch_size=12, seed=7)


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_same_batches_as_the_stream(index):
    direct, size = make(index), 12 * 64
    with Prefetcher(make(index), depth=3) as prefetcher:
        assert prefetcher.position == 0
        for step in range(1, 121):
            batch, waited = prefetcher.next()
            assert np.array_equal(batch, direct.next_batch())
            assert waited >= 0
            assert (prefetcher.position, prefetcher.epoch) == (step * size, direct.epoch)
    assert not data_threads()


class _Slow:
    """A stream that takes its time, and fails at the third batch."""

    def __init__(self, seconds=0.0):
        self.position, self.epoch, self._seconds = 0, 0, seconds

    def next_batch(self):
        time.sleep(self._seconds)
        if self.position == 2:
            raise DataError("shard: gone")
        self.position += 1
        return np.full((1, 2), self.position)


def test_failures_reach_the_caller_after_the_good_batches():
    with Prefetcher(_Slow(), depth=8) as prefetcher:
        assert [prefetcher.next()[0][0, 0] for _ in range(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match="shard: gone"):
                prefetcher.next()
        assert prefetcher.position == 2
    assert not data_threads()


def test_waiting_is_measured():
    with Prefetcher(_Slow(0.2), depth=1) as prefetcher:
        assert prefetcher.next()[1] > 0.1
        time.sleep(0.4)
        assert prefetcher.next()[1] < 0.1


def test_close_with_a_full_queue_leaves_no_thread(index):
    prefetcher = Prefetcher(make(index), depth=2)
    time.sleep(0.1)
    prefetcher.close()
    prefetcher.close()
    assert not data_threads()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.next()
