"""Documents on their way from the source to the shards: sorted by key, on disk.

A task of the source makes two files. `00012.text` holds the content of its documents, in runs that
are sorted by key (a run is what fits into memory). `00012.npy`, written last, holds the keys, the
offsets in the text and the lengths, (3, n) uint64, sorted by key. So a range of keys is a slice of
every table, and few spans of every text; and a task is done where its table is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.shard_writer import commit, partial_path

RUN_BYTES = 1 << 28  # of text that is sorted in memory

Words = NDArray[np.uint64]


class SpillWriter:
    """Takes the documents of a task; a context manager. The table appears if it ends well."""

    def __init__(self, folder: Path, task: int) -> None:
        self._text, self._table = text_path(folder, task), table_path(folder, task)
        self._partial = partial_path(self._text)
        self._file = self._partial.open("wb")
        self._keys: list[int] = []  # of the run
        self._contents: list[bytes] = []
        self._held = 0
        self._runs: list[Words] = []
        self._offset = 0

    def add(self, key: int, content: bytes) -> None:
        """Append a document. The order among equal keys is kept."""
        self._keys.append(key)
        self._contents.append(content)
        self._held += len(content)
        if self._held >= RUN_BYTES:
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
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        commit(self._partial, self._text)
        table = np.concatenate(self._runs, axis=1)
        if len(self._runs) > 1:
            table = np.ascontiguousarray(table[:, np.argsort(table[0], kind="stable")])
        partial = partial_path(self._table)
        with partial.open("wb") as file:
            np.save(file, table)
            file.flush()
            os.fsync(file.fileno())
        commit(partial, self._table)

    def _end_run(self) -> None:
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        contents = [self._contents[number] for number in order.tolist()]
        lengths = np.array([len(content) for content in contents], np.uint64)
        offsets = np.cumsum(lengths, dtype=np.uint64) - lengths + np.uint64(self._offset)
        self._runs.append(np.stack([keys[order], offsets, lengths]))
        self._file.writelines(contents)
        self._offset += self._held
        self._keys, self._contents, self._held = [], [], 0


class Spill:
    """The documents of all tasks."""

    def __init__(self, folder: Path, tasks: int) -> None:
        self._folder, self._tasks = folder, tasks

    def count(self, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """By the top `bits` bits of their 64-bit keys: the bytes and the number of documents."""
        size, number = np.zeros(1 << bits, np.int64), np.zeros(1 << bits, np.int64)
        for task in range(self._tasks):
            keys, _, lengths = np.load(table_path(self._folder, task))
            bins = (keys >> np.uint64(64 - bits)).astype(np.int64)
            np.add.at(size, bins, lengths.astype(np.int64))
            np.add.at(number, bins, 1)
        return size, number

    def documents(self, low: int, high: int) -> Iterator[memoryview]:
        """The content of the documents with keys in [low, high), in the order of their keys.

        Held in memory all at once: read front to back from the disk.
        """
        parts: list[Words] = []  # (4, n): key, number of the content, start in it, length
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
            keys, *places = np.concatenate(parts, axis=1)
            order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the source
            for which, start, length in zip(*(p[order].tolist() for p in places), strict=True):
                yield contents[which][start : start + length]

    def _read_spans(self, task: int, offsets: Words, lengths: Words) -> tuple[memoryview, Words]:
        """The documents at these offsets of a task's text, joined, and where each starts there."""
        order = np.argsort(offsets)
        offsets, sizes = offsets[order], lengths[order]
        ends = np.cumsum(sizes, dtype=np.uint64)
        starts = np.empty_like(ends)
        starts[order] = ends - sizes
        breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
        content = memoryview(bytearray(int(ends[-1])))
        place = 0
        with text_path(self._folder, task).open("rb", buffering=0) as file:
            for first, last in zip([0, *breaks], [*breaks, len(order)], strict=True):
                file.seek(int(offsets[first]))
                while place < int(ends[last - 1]):
                    got = file.readinto(content[place : int(ends[last - 1])])
                    if not got:
                        raise DataError(
                            f"{file.name}: ends early, it was damaged after it was written; "
                            "remove the folder that holds it and start again"
                        )
                    place += got
        return content, starts


def text_path(folder: Path, task: int) -> Path:
    """Where the text of a task goes."""
    return folder / f"{task:05d}.text"


def table_path(folder: Path, task: int) -> Path:
    """Where its table goes; it is there when the task is done."""
    return folder / f"{task:05d}.npy"
