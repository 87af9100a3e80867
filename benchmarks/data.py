"""Benchmark the data stream: throughput against bare readers, a stalling store, a jump in the data.

    python benchmarks/data.py [--tokens 48] [--minutes 2.1] [--step-ms 500]

Writes shards of random tokens to a temporary folder and measures, in one run:

1. tokens/s of the stream (no worker, one worker) against bare `tarfile` and bare webdataset, which
   read and decode the same shards in order, without checks, shuffling or batches;
2. how long a step waits for data from an HTTP server that stalls for 5 seconds once a minute. A
   step is a sleep: first with the batch size and about the step time of configs/quickstart.json,
   then at 2M tokens/s, where 64 MB of prefetched data last for half a minute;
3. opening 1,000 shards at the end of an epoch: index, order and first batch.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from hg_scale.data.blocks import make_readers
from hg_scale.data.index import Index, read_index
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.sequence_schedule import DataSchedule, DataSource
from hg_scale.data.shards import RetryPolicy
from hg_scale.data.stream import TrainingStream


def make_corpus(folder: Path, tokens: int, shards: int) -> Index:
    """Write random bytes to about `shards` equal shards."""
    source = folder / "text"
    source.write_bytes(np.random.default_rng(0).bytes(tokens))
    job = Preparation(
        source, folder / "shards", split=(tokens, 0, 0), shard_tokens=tokens // shards,
        as_they_are=True,
    )  # fmt: skip
    index, _ = prepare_bytes(job)
    source.unlink()
    return index


def open_stream(
    index: Index, workers: int, length: int, batch_size: int, **options: Any
) -> TrainingStream:
    position = options.pop("position", 0)
    schedule = DataSchedule(
        [DataSource("a", index)], sequence_length=length, seed=1, position=position
    )
    readers = make_readers(workers, RetryPolicy(retries=3, timeout=60))
    return TrainingStream(schedule, readers, global_batch_size=batch_size, **options)


class Clock:
    """Wall-clock seconds, and CPU seconds of this process with its threads."""

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall = time.perf_counter() - self._started[0]
        self.cpu = time.process_time() - self._started[1]


def throughput(index: Index, length: int, batch_size: int, rounds: int) -> None:
    clock = Clock()
    paths = [str(Path(index.location) / s.file) for s in index.split("train").shards]
    batches = index.split("train").tokens // (length * batch_size) - 2

    def bare_tarfile() -> int:
        count = 0
        for path in paths:
            with tarfile.open(path, "r|") as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    assert content is not None
                    count += len(np.load(io.BytesIO(content.read())))
        return count

    def bare_webdataset() -> int:
        dataset = webdataset.WebDataset(paths, shardshuffle=False).decode()
        return sum(len(sample["npy"]) for sample in dataset)

    def training_stream(workers: int) -> int:
        with open_stream(index, workers, length, batch_size, batches=batches) as stream:
            stream.next_batch()  # starting a worker is not part of the rate
            clock.start()
            for _ in range(batches - 1):
                stream.next_batch()
            clock.stop()
        return (batches - 1) * length * batch_size

    runs: dict[str, Callable[[], int]] = {
        "bare tarfile": bare_tarfile,
        "bare webdataset": bare_webdataset,
        "stream, thread": functools.partial(training_stream, 0),
        "stream, 1 worker": functools.partial(training_stream, 1),
    }
    rates: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            clock.start()
            count = run()
            if not name.startswith("stream"):
                clock.stop()
            rates.setdefault(name, []).append((count / clock.wall, count / clock.cpu))
    bare, bare_cpu = (max(values) for values in zip(*rates["bare tarfile"], strict=True))
    for name, values in rates.items():
        rate, cpu = (max(of) for of in zip(*values, strict=True))
        print(
            f"{name:>18}: {rate / 1e6:6.1f}M tokens/s ({rate / bare:.2f} of tarfile), "
            f"{cpu / 1e6:6.1f}M per CPU-second of this process ({cpu / bare_cpu:.2f})",
            flush=True,
        )


class StallingHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, except for `stall` seconds at the end of every `period`."""

    period, stall, started = 60.0, 5.0, time.monotonic()
    stalled = 0  # blocks that were delayed

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while block := source.read(1 << 16):
            phase = (time.monotonic() - self.started) % self.period
            if phase > self.period - self.stall:
                StallingHandler.stalled += 1
                time.sleep(self.period - phase)
            try:
                outputfile.write(block)
            except ConnectionError:  # the stream was closed
                return

    def log_message(self, *_: object) -> None:
        pass


def stalling_store(
    index: Index, minutes: float, step: float, length: int, batch_size: int, workers: int
) -> None:
    handler = functools.partial(StallingHandler, directory=index.location)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = read_index(f"http://127.0.0.1:{server.server_port}")
    waits, steps = [], int(minutes * 60 / step)
    with open_stream(remote, workers, length, batch_size) as stream:
        stream.next_batch()
        StallingHandler.started, StallingHandler.stalled = time.monotonic(), 0
        for _ in range(steps):
            time.sleep(step)
            waits.append(stream.next_batch().wait_seconds)
    server.shutdown()
    p50, p99, most = np.quantile(waits, [0.5, 0.99, 1.0])
    print(
        f"{steps} steps of {step * 1000:.0f} ms and {batch_size} x {length} tokens, "
        f"workers {workers}: wait p50 {p50 * 1e3:.2f} ms, "
        f"p99 {p99 * 1e3:.2f} ms ({p99 / step:.2%} of a step), "
        f"longest {most * 1e3:.1f} ms; the store delayed {StallingHandler.stalled} blocks",
        flush=True,
    )


def end_of_epoch(index: Index, length: int, batch_size: int, workers: int) -> None:
    order = DataSchedule([DataSource("a", index)], sequence_length=length, seed=1).orders[0]
    position = (order.sequences_per_epoch - 4 * batch_size) * length
    start = time.perf_counter()
    reopened = read_index(index.location)
    with open_stream(reopened, workers, length, batch_size, position=position, batches=2) as stream:
        stream.next_batch()
        seconds = time.perf_counter() - start
    shards = len(reopened.split("train").shards)
    print(f"end of an epoch of {shards} shards, workers {workers}: {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="millions, of the first corpus")
    parser.add_argument(
        "--minutes", type=float, default=2.1, help="duration of each run with the stalling store"
    )
    parser.add_argument("--step-ms", type=float, default=500.0, help="step time that is simulated")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of the throughput; the best of each counts"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("large", "many"):
            (Path(folder) / name).mkdir()
        large = make_corpus(Path(folder) / "large", options.tokens * 10**6, 32)
        throughput(large, 2048, 32, options.rounds)
        many = make_corpus(Path(folder) / "many", 100 * 10**6, 1000)
        for workers in (0, 1):
            end_of_epoch(many, 2048, 32, workers)
        step = options.step_ms / 1000
        stalling_store(large, options.minutes, step, 510, 4, 0)
        for workers in (0, 1):
            stalling_store(large, options.minutes, step, 2048, round(2e6 * step / 2048), workers)


if __name__ == "__main__":
    main()
