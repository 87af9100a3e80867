"""What is to be prepared: files, the pieces of work they make, and where their documents go."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hg_scale.data.errors import DataError
from hg_scale.data.index import SPLITS
from hg_scale.data.preparation.sources import find_files, refuse_other_packing
from hg_scale.data.tokenizer import Tokenizer

KEY_BITS = 62  # of a key: the order in the split; the split's number stands above them
FOLDER_SPLITS = {
    "train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2,
}  # fmt: skip

_TASK_BYTES = 1 << 28  # of stored text, at most: what a killed process has to do again
_LEAST_TASK = 1 << 20
_TASKS = 64  # wanted, so that processes end at about the same time


class File(NamedTuple):
    """A file of the source."""

    path: str
    name: str  # relative to the input, so that keys do not depend on where the corpus lies
    size: int  # bytes as stored
    changed: int  # its time, in ns


class Segment(NamedTuple):
    """A part of a file: the documents that begin at the stored bytes [begin, end)."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True)
class ReadTask:
    """Segments that one process reads in one go."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(segment.end - segment.begin for segment in self.segments)


class DocumentSource(Protocol):
    """A source of documents: text (`documents.py`) or images (`images.py`)."""

    tokenizer: Tokenizer

    @property
    def document_tokens(self) -> int | None: ...  # where every document has the same number

    files: list[File]

    def survey(self) -> dict[str, Any]:
        """Look through the input, on rank 0: what `adopt` needs, as JSON."""

    def adopt(self, survey: dict[str, Any]) -> None:
        """Take over the survey of rank 0; before anything below is used."""

    def source(self) -> dict[str, Any]:
        """What decides the shards, for the index."""

    def tasks(self) -> list[ReadTask]:
        """All the work, cut the same for every number of processes."""

    def documents(
        self, segment: Segment, scratch: Path, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, bytes]]:
        """(key, content) of the documents of a segment that are not empty, in a fixed order.

        A key is the split's number in the bits above `KEY_BITS`, then the order in the split.
        `advance` is told the stored bytes read; `scratch` is a folder for temporary files.
        """


def list_files(
    inputs: Sequence[Path], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[File]:
    """The files of the inputs, in a fixed order.

    Raises DataError where one cannot be listed or read, or is in two of the inputs.
    """
    files = []
    found: dict[Path, int] = {}  # the input that has a file
    for number, given in enumerate(inputs):
        if given.is_dir():
            names = find_files(given, include, exclude)
        else:
            refuse_other_packing(given)
            names = [given.name]
        for name in names:
            path = given / name if given.is_dir() else given
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from None
            if len(inputs) > 1 and found.setdefault(path.resolve(), number) != number:
                raise DataError(
                    f"--input {given}: {path} is also in --input {inputs[found[path.resolve()]]}; "
                    "name it once"
                )
            known = name if len(inputs) == 1 else f"{number}:{name}"
            files.append(File(str(path), known, status.st_size, status.st_mtime_ns))
    return files


def refuse_empty(files: Sequence[File]) -> None:
    """For files of kinds that are never empty. Raises DataError where one is."""
    for file in files:
        if not file.size:
            raise DataError(
                f"{file.path}: is empty, as what was not copied to its end; fetch it again, or "
                "leave it out with --exclude"
            )


def listing(files: Sequence[File]) -> dict[str, Any]:
    """What tells these files from others without reading them, for the index."""
    names, times = hashlib.sha256(), hashlib.sha256()
    for file in files:
        names.update(f"{file.size} {file.name}\n".encode("utf-8", "surrogateescape"))
        times.update(f"{file.changed}\n".encode())
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "names and sizes": names.hexdigest(),
        "times of the files": times.hexdigest(),
    }


def make_tasks(
    files: Sequence[File], splittable: Callable[[File], bool], multiple: int = 1
) -> list[ReadTask]:
    """Cut large files and gather small ones; segments begin at multiples of `multiple`."""
    total = sum(file.size for file in files)
    wanted = min(max(total // _TASKS, _LEAST_TASK), _TASK_BYTES)
    wanted = -(-wanted // multiple) * multiple
    tasks: list[ReadTask] = []
    gathered: list[Segment] = []

    def close() -> None:
        if gathered:
            tasks.append(ReadTask(len(tasks), tuple(gathered)))
            gathered.clear()

    for number, file in enumerate(files):
        step = wanted if splittable(file) else max(file.size, 1)
        for begin in range(0, file.size, step):
            segment = Segment(number, begin, min(begin + step, file.size))
            held = sum(part.end - part.begin for part in gathered)
            if held + segment.end - segment.begin > wanted:
                close()
            gathered.append(segment)
    close()
    return tasks


class Keys:
    """The key of a document: its split, and its place in the shuffled order.

    The split follows from the content, so that equal documents land in the same one and a new
    document moves no other; or from the folder the file is in. The place follows from the file's
    name and the document's position in it.
    """

    def __init__(self, split: tuple[float, ...] | None, seed: int) -> None:
        """`split`: fractions, or None for the folders `train/`, `validation/` and `test/`."""
        self._split, self._seed = split, seed
        self._salt = _salt(seed)
        self._name, self._key = "", b""

    def __call__(self, file: File, place: int, content: bytes) -> int:
        if file.name != self._name:
            name = file.name.encode("utf-8", "surrogateescape")
            self._name = file.name
            self._key = hashlib.blake2b(name, key=self._salt, digest_size=32).digest()
        drawn = hashlib.blake2b(place.to_bytes(8, "big"), key=self._key, digest_size=8).digest()
        if self._split is None:
            split = folder_split(file)
        else:
            split = SPLITS.index(split_of([content], self._split, self._seed))
        return split << KEY_BITS | int.from_bytes(drawn, "big") >> (64 - KEY_BITS)


def _salt(seed: int) -> bytes:
    return seed.to_bytes(16, "big", signed=True)


def split_of(content: Iterable[bytes], fractions: Sequence[float], seed: int) -> str:
    """The split of a document, by a hash of its content, which comes in pieces."""
    digest = hashlib.blake2b(key=_salt(seed), digest_size=8)
    for piece in content:
        digest.update(piece)
    place = int.from_bytes(digest.digest(), "big") / 2**64
    for name, bound in zip(SPLITS, accumulate(fractions), strict=True):
        if place < bound:
            return name
    return [name for name, part in zip(SPLITS, fractions, strict=True) if part][-1]


def folder_split(file: File) -> int:
    """The number of the split that the file's topmost folder names. Raises DataError."""
    top = file.name.rpartition(":")[2].split("/")[0]
    if top not in FOLDER_SPLITS or "/" not in file.name:
        raise DataError(
            f"{file.path}: --split folders wants every file below train/, validation/ or test/ of "
            "--input; move it, or give fractions"
        )
    return FOLDER_SPLITS[top]
