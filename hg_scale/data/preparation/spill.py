"""Documents between the two passes: sorted by key, on disk.

Each task writes two files. `00012.text` contains its documents in runs that are sorted by key (a
run is what fits into memory). `00012.npy`, written last, contains the keys, the offsets in the
text and the lengths, (3, n) uint64, sorted by key. So a range of keys is a slice of every table
and a few spans of every text, and a task is done once its table exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hg_scale.atomic_write import commit, durable_file, partial_path
from hg_scale.data.errors import DataError

RUN_BYTES = 1 << 28  # of text that is sorted in memory

_UInt64Array = NDArray[np.uint64]


class SpillWriter:
    """Writes the documents of a task; a context manager. Its files appear if no error is raised."""

    def __init__(self, folder: Path, task: int) -> None:
        self._text, self._table = text_path(folder, task), table_path(folder, task)
        self._partial = partial_path(self._text)
        self._file = self._partial.open("wb")
        self._keys: list[int] = []  # of the current run
        self._contents: list[bytes] = []
        self._run_bytes = 0
        self._runs: list[_UInt64Array] = []
        self._offset = 0

    def add(self, key: int, content: bytes) -> None:
        """Append a document. The order among equal keys is kept."""
        self._keys.append(key)
        self._contents.append(content)
        self._run_bytes += len(content)
        if self._run_bytes >= RUN_BYTES:
            self._end_run()

    def __enter__(self) -> SpillWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        self._end_run()
        commit(self._file, self._text)
        table = np.concatenate(self._runs, axis=1)
        if len(self._runs) > 1:
            table = np.ascontiguousarray(table[:, np.argsort(table[0], kind="stable")])
        with durable_file(self._table) as file:
            np.save(file, table)

    def _end_run(self) -> None:
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        contents = [self._contents[number] for number in order.tolist()]
        lengths = np.array([len(content) for content in contents], np.uint64)
        offsets = np.cumsum(lengths, dtype=np.uint64) - lengths + np.uint64(self._offset)
        self._runs.append(np.stack([keys[order], offsets, lengths]))
        self._file.writelines(contents)
        self._offset += self._run_bytes
        self._keys, self._contents, self._run_bytes = [], [], 0


class Spill:
    """The documents of all tasks."""

    def __init__(self, folder: Path, tasks: int) -> None:
        self._folder, self._tasks = folder, tasks

    def count(self, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (bytes, number of documents) by the top `bits` bits of their 64-bit keys."""
        size, number = np.zeros(1 << bits, np.int64), np.zeros(1 << bits, np.int64)
        for task in range(self._tasks):
            keys, _, lengths = np.load(table_path(self._folder, task))
            bins = (keys >> np.uint64(64 - bits)).astype(np.int64)
            np.add.at(size, bins, lengths.astype(np.int64))
            np.add.at(number, bins, 1)
        return size, number

    def documents(self, low: int, high: int) -> Iterator[memoryview]:
        """Yield the content of the documents with keys in [low, high), in the order of their keys.

        All of it is in memory at once, since each file is read front to back.
        """
        parts: list[_UInt64Array] = []  # (4, n): key, number of the content, start in it, length
        contents: list[memoryview] = []
        for task in range(self._tasks):
            table = np.load(table_path(self._folder, task), mmap_mode="r")
            first, last = np.searchsorted(table[0], np.array([low, high], np.uint64))
            if first < last:
                part = np.array(table[:, first:last])
                content, starts = self._read_spans(task, part[1], part[2])
                which = np.full(len(starts), len(contents), np.uint64)
                parts.append(np.stack([part[0], which, starts, part[2]]))
                contents.append(content)
        if parts:
            keys, *spans = np.concatenate(parts, axis=1)
            order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the source
            for which, start, length in zip(*(s[order].tolist() for s in spans), strict=True):
                yield contents[which][start : start + length]

    def _read_spans(
        self, task: int, offsets: _UInt64Array, lengths: _UInt64Array
    ) -> tuple[memoryview, _UInt64Array]:
        """Return the documents at `offsets` of a task's text, joined, and the start of each."""
        order = np.argsort(offsets)
        offsets, sizes = offsets[order], lengths[order]
        ends = np.cumsum(sizes, dtype=np.uint64)
        starts = np.empty_like(ends)
        starts[order] = ends - sizes
        breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
        content = memoryview(bytearray(int(ends[-1])))
        filled = 0
        with text_path(self._folder, task).open("rb", buffering=0) as file:
            for first, last in zip([0, *breaks], [*breaks, len(order)], strict=True):
                file.seek(int(offsets[first]))
                while filled < int(ends[last - 1]):
                    count = file.readinto(content[filled : int(ends[last - 1])])
                    if not count:
                        raise DataError(
                            f"{file.name}: is truncated, it was corrupted after it was written; "
                            "remove the folder that contains it and start again"
                        )
                    filled += count
        return content, starts


def text_path(folder: Path, task: int) -> Path:
    """Return the path of a task's text."""
    return folder / f"{task:05d}.text"


def table_path(folder: Path, task: int) -> Path:
    """Return the path of a task's table, which exists once the task is done."""
    return folder / f"{task:05d}.npy"
