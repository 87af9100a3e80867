"""The files of a corpus, the tasks that read them, and the split and key of each document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import SPLITS
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.folders import LeftOut, find_files
from hg_scale.data.preparation.short_digests import keyed_digests
from hg_scale.data.preparation.skipping import STOP, SkipLog
from hg_scale.data.preparation.sources import Advance
from hg_scale.data.tokenizer import Tokenizer

KEY_BITS = 62  # low bits of a key: the order in the split; the bits above are the split's number
FOLDER_SPLITS = {
    "train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2,
}  # fmt: skip

_MAX_TASK_BYTES = 1 << 28  # of stored text: the work that a killed process loses
_MIN_TASK_BYTES = 1 << 20
_TASKS = 64  # at least, so that processes end at about the same time


class SourceFile(NamedTuple):
    """A file of the source."""

    path: str
    name: str  # relative to the input, so that keys do not depend on the corpus's location
    size: int  # bytes as stored
    modified: int  # in ns


class Segment(NamedTuple):
    """A part of a file: the documents whose first stored byte is in [begin, end)."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True)
class ReadTask:
    """Segments that one process reads as one unit of work."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(segment.end - segment.begin for segment in self.segments)


KeyedBatch = tuple[NDArray[np.uint64], DocumentBatch]  # keys (n,), the documents


class Corpus(Protocol):
    """A source of documents: `TextCorpus` or `ImageCorpus`."""

    tokenizer: Tokenizer

    @property
    def document_tokens(self) -> int | None: ...  # None where the lengths differ

    files: list[SourceFile]

    def survey(self, log: SkipLog = STOP) -> dict[str, Any]:
        """Scan the input, on rank 0. Returns JSON for `use_survey`."""

    def use_survey(self, survey: dict[str, Any]) -> None:
        """Set the files that rank 0 found; needed by all methods below."""

    def source(self) -> dict[str, Any]:
        """Return the entry of the index that describes the source and the options."""

    def tasks(self) -> list[ReadTask]:
        """Return all tasks; they do not depend on the number of processes."""

    def documents(
        self, segment: Segment, scratch: Path, advance: Advance, log: SkipLog = STOP
    ) -> Iterator[KeyedBatch]:
        """Yield (keys, batch) of the documents of a segment that are not empty, in a fixed order.

        A key is the split's number in the bits above `KEY_BITS`, then the order in the split.
        `scratch` is a folder for temporary files. A document that cannot be read goes to `log`;
        DataError is raised where the rest of the segment cannot be read.
        """

    def remarks(self) -> Iterator[str]:
        """Yield lines for the user about what is read and what is not, after `survey`."""


def list_files(
    inputs: Sequence[Path],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    log: SkipLog = STOP,
    left_out: LeftOut | None = None,
) -> list[SourceFile]:
    """Return the files of the inputs, in a fixed order. What cannot be read goes to `log`.

    `left_out` receives what is not read for other reasons. Raises DataError where a file is in two
    of the inputs.
    """
    files = []
    found: dict[Path, int] = {}  # number of the input that contains a file
    for number, given in enumerate(inputs):
        is_folder = given.is_dir()
        names = [given.name]
        if is_folder:
            names = find_files(given, include, exclude, log, left_out)
        for name in names:
            path = given / name if is_folder else given
            try:
                status = path.stat()
            except OSError as error:
                log.skip(path, "file", None, f"{path}: cannot be read ({error.strerror})")
                continue
            if len(inputs) > 1 and found.setdefault(path.resolve(), number) != number:
                raise DataError(
                    f"--input {given}: {path} is also in --input {inputs[found[path.resolve()]]}; "
                    "name it once"
                )
            unique = name if len(inputs) == 1 else f"{number}:{name}"
            files.append(SourceFile(str(path), unique, status.st_size, status.st_mtime_ns))
    return files


def refuse_empty(
    files: Sequence[SourceFile], never_empty: Container[SourceFile], log: SkipLog = STOP
) -> list[SourceFile]:
    """Return the files without empty ones that are among `never_empty`: these go to `log`."""
    left = []
    for file in files:
        if not file.size and file in never_empty:
            log.skip(
                file.path,
                "file",
                None,
                f"{file.path}: is empty, as after an unfinished copy; download it again, or leave "
                "it out with --exclude",
            )
        else:
            left.append(file)
    return left


def check_folders(files: Sequence[SourceFile]) -> None:
    """Raise DataError where a file is in no folder that names a split."""
    for file in files:
        folder_split(file)


def fingerprint(files: Sequence[SourceFile]) -> dict[str, Any]:
    """Return what identifies the files without reading them, for the index."""
    names, times = hashlib.sha256(), hashlib.sha256()
    for file in files:
        names.update(f"{file.size} {file.name}\n".encode("utf-8", "surrogateescape"))
        times.update(f"{file.modified}\n".encode())
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "names and sizes": names.hexdigest(),
        "times of the files": times.hexdigest(),
    }


def make_tasks(
    files: Sequence[SourceFile], splittable: Callable[[SourceFile], bool], multiple: int = 1
) -> list[ReadTask]:
    """Split large files and group small ones; segments begin at multiples of `multiple`."""
    total = sum(file.size for file in files)
    task_bytes = min(max(total // _TASKS, _MIN_TASK_BYTES), _MAX_TASK_BYTES)
    task_bytes = -(-task_bytes // multiple) * multiple
    tasks: list[ReadTask] = []
    pending: list[Segment] = []

    def close() -> None:
        if pending:
            tasks.append(ReadTask(len(tasks), tuple(pending)))
            pending.clear()

    for number, file in enumerate(files):
        step = task_bytes if splittable(file) else max(file.size, 1)
        for begin in range(0, file.size, step):
            segment = Segment(number, begin, min(begin + step, file.size))
            size = sum(part.end - part.begin for part in pending)
            if size + segment.end - segment.begin > task_bytes:
                close()
            pending.append(segment)
    close()
    return tasks


class DocumentKeys:
    """Computes the keys of documents: the split, then its position in the shuffled order.

    The split follows from the content, so that equal documents are in the same split and a new
    document moves no other; or from the file's folder. The position follows from the file's name
    and the document's position in the file.
    """

    def __init__(self, split: tuple[float, ...] | None, seed: int) -> None:
        """`split`: fractions, or None for the folders `train/`, `validation/` and `test/`."""
        self._split, self._seed = split, seed
        self._salt = _salt(seed)
        self._name, self._key = "", b""

    def __call__(
        self, file: SourceFile, positions: NDArray[np.int64], batch: DocumentBatch
    ) -> NDArray[np.uint64]:
        """Return the keys (n,) of documents of a file at these positions."""
        if file.name != self._name:
            name = file.name.encode("utf-8", "surrogateescape")
            self._name = file.name
            self._key = hashlib.blake2b(name, key=self._salt, digest_size=32).digest()
        numbers = positions.astype(">u8").view(np.uint8)
        eight = np.full(len(positions), 8)
        order = keyed_digests(self._key, numbers, np.cumsum(eight) - eight, eight)
        return order >> np.uint64(64 - KEY_BITS) | self._splits(file, batch) << np.uint64(KEY_BITS)

    def _splits(self, file: SourceFile, batch: DocumentBatch) -> NDArray[np.uint64]:
        """Return the number of the split of each document."""
        if self._split is None:
            return np.full(len(batch.starts), folder_split(file), np.uint64)
        digests = keyed_digests(self._salt, *batch)
        return np.array(choose_split(digests, self._split), np.uint64)


def _salt(seed: int) -> bytes:
    return seed.to_bytes(16, "big", signed=True)


def split_of(content: Iterable[bytes], fractions: Sequence[float], seed: int) -> str:
    """Return the split of a document by a hash of its content, an iterable of pieces."""
    digest = hashlib.blake2b(key=_salt(seed), digest_size=8)
    for piece in content:
        digest.update(piece)
    return SPLITS[int(choose_split(int.from_bytes(digest.digest(), "big"), fractions))]


def choose_split(digest: int | NDArray[np.uint64], fractions: Sequence[float]) -> Any:
    """Return the number of the split for hashes of 64 bits, of their shape."""
    position = np.asarray(digest, np.uint64).astype(np.float64) / 2**64  # in [0, 1]
    bounds = np.array(list(accumulate(fractions)))
    last = max(number for number, part in enumerate(fractions) if part)
    found = np.searchsorted(bounds, position, side="right")
    return np.where(found < len(fractions), found, last)


def folder_split(file: SourceFile) -> int:
    """Return the number of the split that the file's topmost folder names, or raise DataError."""
    top = file.name.rpartition(":")[2].split("/")[0]
    if top not in FOLDER_SPLITS or "/" not in file.name:
        raise DataError(
            f"{file.path}: --split folders needs every file below train/, validation/ or test/ of "
            "--input; move it, or set --split to fractions"
        )
    return FOLDER_SPLITS[top]
