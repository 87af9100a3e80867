"""Worker processes: their answers, and how they and their parent end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hg_scale.data.blocks import BlockRequest, LocalReader, WorkerReader, make_readers
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.shards import RetryPolicy, ShardFile
from tests.data.conftest import TEXT, schedule, stream

ROOT = Path(__file__).parents[2]


def request(index, number=0, start=0, stop=3000, slot=(0, 0)):
    file = ShardFile.from_index(index, index.splits["train"].shards[number])
    return BlockRequest(slot, file, start, stop)


@pytest.fixture
def worker():
    process = WorkerReader(0, RetryPolicy())
    yield process
    process.close()


def test_worker_and_local_reader_agree(writable, worker):
    path = Path(writable.location, "train-00001.tar")
    path.write_bytes(path.read_bytes()[:5000])
    local = LocalReader(RetryPolicy())
    for block in (
        request(writable, 0, 10, 2000),
        request(writable, 1, slot=(0, 1)),
        request(writable, 0, 1990, 2990),
        request(writable, 2),
    ):
        answer, expected = worker.read(block), local.read(block)
        assert np.array_equal(answer.tokens, expected.tokens)
        assert answer.tokens.dtype == expected.tokens.dtype
        assert answer.unusable == expected.unusable
    assert worker.read(request(writable, 1)).unusable


def test_killed_worker_raises_one_line(index, worker):
    worker.read(request(index))
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data worker 0 \(process \d+\) died with exit code -9"):
        worker.read(request(index))


def test_stream_raises_when_workers_are_killed(index):
    with stream(schedule(index), workers=2) as training:
        training.next_batch()
        for reader in training._loader._readers:
            os.kill(reader._process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="died with exit code -9") as caught:
            for _ in range(10_000):
                training.next_batch()
    assert "\n" not in str(caught.value)


def test_closing_ends_worker_processes_during_a_read(index):
    index = Index(**index.model_dump())
    index._location = "pipe:sleep 60; cat {}"
    training = stream(schedule(index), workers=2)
    training._plan()
    time.sleep(0.5)
    processes = [reader._process for reader in training._loader._readers]
    training.close()
    training.close()
    assert not any(process.is_alive() for process in processes)


PARENT = """
import os, sys, time
from hg_scale.data.blocks import WorkerReader
from hg_scale.data.shards import RetryPolicy
if __name__ == "__main__":
    workers = [WorkerReader(number, RetryPolicy()) for number in range(2)]
    print(*(worker._process.pid for worker in workers), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_exit_when_their_parent_is_killed(tmp_path, signal_number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    parent.send_signal(signal_number)
    parent.wait(60)
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "the workers are still running"
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_worker_imports_no_torch(index, worker):
    worker.read(request(index))  # webdataset is imported by now
    maps = Path(f"/proc/{worker._process.pid}/maps").read_text()
    assert "numpy" in maps and "libtorch" not in maps


def test_zero_workers_read_in_this_process(index):
    (reader,) = make_readers(0, RetryPolicy())
    assert reader.read(request(index)).tokens.tobytes() == TEXT[:3000]
