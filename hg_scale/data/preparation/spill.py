"""Documents between the two passes: sorted by key, on disk.

Each task writes two files. `00012.text` contains its documents in runs that are sorted by key (a
run is what fits into memory). `00012.table`, which appears last, contains little-endian uint64: for
each run the keys (n) and the bounds (n + 1) of its documents in the text; then the footer. So a
range of keys is a slice of every run, and one span of its text.

Neither file is synced, as a killed process loses nothing that it wrote. The footer has checksums,
which find what a machine that crashed did lose; that task is then done again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from hg_scale.atomic_write import partial_path
from hg_scale.data.errors import DataError
from hg_scale.data.preparation.batches import DocumentBatch

RUN_BYTES = 1 << 28  # of text that is sorted in memory
RUN_DOCUMENTS = 1 << 19  # as many short documents take about 50 MB in memory
_BLOCK = 1 << 20
_WORD = np.dtype("<u8")
_FOOTER = 4  # words after the documents of each run

_UInt64Array = NDArray[np.uint64]


class SpillWriter:
    """Writes the documents of a task; a context manager. Its files appear if no error is raised."""

    def __init__(self, folder: Path, task: int) -> None:
        self._paths = text_path(folder, task), table_path(folder, task)
        self._partials = [partial_path(path) for path in self._paths]
        self._text, self._table = (_HashedFile(path) for path in self._partials)
        self._runs: list[int] = []  # documents of each
        self._clear()

    def add(self, keys: _UInt64Array, batch: DocumentBatch) -> None:
        """Append documents, whose keys are (n,). The order among equal keys is kept."""
        self._keys.append(keys)
        self._starts.append(batch.starts + len(self._held))
        self._lengths.append(batch.lengths)
        self._held += memoryview(batch.text)  # type: ignore[arg-type]
        self._documents += len(keys)
        if len(self._held) >= RUN_BYTES or self._documents >= RUN_DOCUMENTS:
            self._end_run()

    def __enter__(self) -> SpillWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end_run()
                footer = [*self._runs, len(self._runs), self._text.size, self._text.digest()]
                self._table.write(np.array(footer, _WORD))
                self._table.write(np.array([self._table.digest()], _WORD))
            self._text.close()
            self._table.close()
            if error is None:
                for partial, path in zip(self._partials, self._paths, strict=True):
                    os.replace(partial, path)
        finally:
            for partial in self._partials:
                partial.unlink(missing_ok=True)

    def _end_run(self) -> None:
        if not self._documents:
            return
        keys = np.concatenate(self._keys)
        order = np.argsort(keys, kind="stable")
        text = np.frombuffer(self._held, np.uint8)
        starts, lengths = np.concatenate(self._starts), np.concatenate(self._lengths)
        batch = DocumentBatch(text, starts[order], lengths[order])
        bounds = self._text.size + np.concatenate([[0], np.cumsum(batch.lengths)])
        self._table.write(keys[order].astype(_WORD, copy=False))
        self._table.write(bounds.astype(_WORD))
        for packed in batch.packed():
            self._text.write(packed.text)
        self._runs.append(len(keys))
        self._clear()

    def _clear(self) -> None:
        """Begin a run."""
        self._keys: list[_UInt64Array] = []
        self._starts: list[NDArray[np.int64]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._held, self._documents = bytearray(), 0


class _HashedFile:
    """A file that is written, with its size and checksum so far."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash, self.size = path.open("wb"), xxhash.xxh3_64(), 0

    def write(self, data: NDArray[np.uint8] | _UInt64Array) -> None:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._file.write(view)
        self._hash.update(view)
        self.size += len(view)

    def digest(self) -> int:
        return self._hash.intdigest()

    def close(self) -> None:
        self._file.close()


class _Run(NamedTuple):
    """Documents of a task, sorted by key: keys (n,), bounds (n + 1,) in its text."""

    keys: _UInt64Array
    bounds: _UInt64Array


class Spill:
    """The documents of all tasks."""

    def __init__(self, folder: Path, tasks: int) -> None:
        self._folder, self._tasks = folder, tasks

    def is_intact(self, task: int) -> bool:
        """Return whether the files of a task are as they were written; reads them."""
        table, text = table_path(self._folder, task), text_path(self._folder, task)
        with suppress(FileNotFoundError), table.open("rb") as file:
            words = file.seek(0, os.SEEK_END) // _WORD.itemsize
            if words < _FOOTER:
                return False
            _, size, text_digest, table_digest = _read_footer(file)
            file.seek(0)
            if _digest(file, (words - 1) * _WORD.itemsize) != table_digest:
                return False
            with text.open("rb") as content:
                return text.stat().st_size == size and _digest(content, size) == text_digest
        return False

    def count(self, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (bytes, number of documents) by the top `bits` bits of their 64-bit keys."""
        size, number = np.zeros(1 << bits, np.int64), np.zeros(1 << bits, np.int64)
        for task in range(self._tasks):
            for run in self._runs(task):
                bins = (run.keys >> np.uint64(64 - bits)).astype(np.int64)
                np.add.at(size, bins, np.diff(run.bounds).astype(np.int64))
                np.add.at(number, bins, 1)
        return size, number

    def documents(self, low: int, high: int) -> Iterator[DocumentBatch]:
        """Yield the documents with keys in [low, high), in the order of their keys.

        A batch is what fits into memory, since each file is read front to back.
        """
        spans = self._find(low, high)
        if spans is None:
            middle = (low + high) // 2
            yield from self.documents(low, middle)
            yield from self.documents(middle, high)
        elif spans:
            yield self._read(spans)

    def _runs(self, task: int) -> Iterator[_Run]:
        """Yield the runs of a task, which are mapped into memory, one at a time."""
        path = table_path(self._folder, task)
        with path.open("rb") as file:
            count = _read_footer(file)[0]
            file.seek(-(_FOOTER + count) * _WORD.itemsize, os.SEEK_END)
            lengths = np.fromfile(file, _WORD, count).tolist()
        offset = 0
        for n in lengths:
            words = np.memmap(path, _WORD, "r", offset, (2 * n + 1,))
            yield _Run(words[:n], words[n:])
            offset += words.nbytes

    def _find(self, low: int, high: int) -> list[tuple[int, _Run]] | None:
        """Return (task, part of a run) with keys in [low, high); None if they are too many."""
        spans, size, number = [], 0, 0
        for task in range(self._tasks):
            for run in self._runs(task):
                first, last = np.searchsorted(run.keys, np.array([low, high], np.uint64)).tolist()
                if first == last:
                    continue
                size += int(run.bounds[last] - run.bounds[first])
                number += last - first
                too_many = size > RUN_BYTES or number > RUN_DOCUMENTS
                if too_many and number > 1 and high - low > 1:
                    return None
                part = _Run(np.array(run.keys[first:last]), np.array(run.bounds[first : last + 1]))
                spans.append((task, part))
        return spans

    def _read(self, spans: list[tuple[int, _Run]]) -> DocumentBatch:
        """Return the documents of these parts, sorted; equal keys in the order of the parts."""
        lengths = np.concatenate([np.diff(run.bounds) for _, run in spans]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        text = np.empty(int(lengths.sum()), np.uint8)
        filled = 0
        for task, run in spans:
            begin, end = int(run.bounds[0]), int(run.bounds[-1])
            self._read_into(text[filled : filled + end - begin], task, begin)
            filled += end - begin
        order = np.argsort(np.concatenate([run.keys for _, run in spans]), kind="stable")
        return DocumentBatch(text, starts[order], lengths[order])

    def _read_into(self, target: NDArray[np.uint8], task: int, begin: int) -> None:
        view = memoryview(target)  # type: ignore[arg-type]
        with text_path(self._folder, task).open("rb", buffering=0) as file:
            file.seek(begin)
            while view:
                count = file.readinto(view)
                if not count:
                    raise DataError(
                        f"{file.name}: is truncated, it was corrupted after it was written; "
                        "remove the folder that contains it and start again"
                    )
                view = view[count:]


def _read_footer(file: BinaryIO) -> list[int]:
    """Return a table's number of runs, then the size and checksum of the text, and its own."""
    file.seek(-_FOOTER * _WORD.itemsize, os.SEEK_END)
    return np.fromfile(file, _WORD, _FOOTER).tolist()


def _digest(file: BinaryIO, size: int) -> int:
    """Return the checksum of the next `size` bytes."""
    digest = xxhash.xxh3_64()
    while size and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.intdigest()


def text_path(folder: Path, task: int) -> Path:
    """Return the path of a task's text."""
    return folder / f"{task:05d}.text"


def table_path(folder: Path, task: int) -> Path:
    """Return the path of a task's table, which exists once the task is done."""
    return folder / f"{task:05d}.table"
