"""Reading shards (`shard_writer` writes them), front to back, through webdataset.

Reading enters a local file at any member; what comes from a URL or a pipe is read from its
beginning. Every member is checked against the index. Nothing is ever unpacked to disk, and a
member counts only under the name that the index gives it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import threading
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import (
    Index,
    Members,
    Shard,
    is_local,
    member_name,
)
from hg_scale.data.store import SILENCE, Stream, read_error_line
from hg_scale.data.tokenizer import token_dtype

_REMEDY = "copy the shard again or prepare the data again"
_BACK_OFF = 0.5, 30.0  # seconds before the first retry, doubled for each further one, and at most


@dataclass(frozen=True)
class RetryPolicy:
    """How often a read that fails is tried again, and how many seconds it may stand still."""

    retries: int = 0
    timeout: float = SILENCE


@dataclass(frozen=True)
class ShardFile:
    """What reading needs to know of a shard; small, so that it can be sent to a worker."""

    url: str
    name: str
    file_bytes: int
    vocab_size: int
    members: Members

    @classmethod
    def of(cls, index: Index, shard: Shard) -> ShardFile:
        """A shard of an index."""
        return cls(index.url(shard), shard.file, shard.file_bytes, index.vocab_size, shard.members)


class Fault(NamedTuple):
    """Tokens [start, stop) that cannot be used, and why: one line naming shard and member."""

    start: int
    stop: int
    message: str


class Loaded(NamedTuple):
    """Ids (n,) in the shard's dtype, and which of them cannot be used (they are zeros)."""

    tokens: NDArray[Any]
    faults: list[Fault]


class ShardReader:
    """Spans of the tokens of one shard, cheap when asked for front to back.

    Behind a URL or a pipe every fault is tried again, in a local file those of the file system:
    `patience.retries` times in a row, each time after a longer pause. `closing` ends that early.
    """

    def __init__(
        self,
        file: ShardFile,
        patience: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
        closing: threading.Event | None = None,
    ) -> None:
        self.file, self._patience = file, patience
        self._closing = closing or threading.Event()
        self._starts = np.cumsum([0, *file.members.tokens])
        self._archive: _Archive | None = None
        self._tries = patience.retries  # left; a member that reads well gives all of them back
        self._last: tuple[int, NDArray[Any] | str] = -1, ""  # a member, or what is wrong with it
        self._lost: tuple[int, str] | None = None  # no way past this member

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The ids of positions [start, stop). Raises DataError at the first one not usable."""
        loaded = self.load(start, stop)
        if loaded.faults:
            raise DataError(loaded.faults[0].message)
        return loaded.tokens

    def load(self, start: int, stop: int) -> Loaded:
        """The same as far as it can be used; faults count from `start`."""
        tokens = np.zeros(stop - start, token_dtype(self.file.vocab_size))
        faults: list[Fault] = []
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        for number in range(int(first), int(last) + 1):
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            here = slice(max(begin, start) - start, min(end, stop) - start)
            content = self._member(number)
            if isinstance(content, str):
                faults.append(Fault(here.start, here.stop, content))
            else:
                tokens[here] = content[max(start - begin, 0) : stop - begin]
        return Loaded(tokens, faults)

    def close(self) -> None:
        """Let go of the file."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def kill(self) -> None:
        """End the process behind a pipe, from another thread; what reads from it then fails."""
        if (archive := self._archive) is not None:
            archive.stream.kill()

    def _member(self, number: int) -> NDArray[Any] | str:
        """The ids of a member, or what is wrong with it."""
        if self._last[0] != number:
            if self._lost and number >= self._lost[0]:
                return self._lost[1]
            self._last = number, self._fetch(number)
        return self._last[1]

    def _fetch(self, number: int) -> NDArray[Any] | str:
        """Read a member, again and again where that may help."""
        remote, tried = not is_local(self.file.url), 0
        pause, longest = _BACK_OFF
        while True:
            tried += 1
            try:
                content = self._open_at(number).member(number)
                self._tries = self._patience.retries
                return content
            except _WrongMember as error:
                message, again, lost = str(error), remote, False
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                message, lost = _unreadable(error, self.file, f" at member {number}"), remote
                again = remote or isinstance(error, OSError)
                self.close()
            if not again or tried > self._tries or self._closing.is_set():
                break
            self.close()
            self._closing.wait(pause)
            pause = min(2 * pause, longest)
        if again:
            self._tries = 0  # until a member reads well, the next ones get one try each
        if tried > 1:
            message += f" (tried {tried} times)"
        if lost:
            self._lost = number, message
        return message

    def _open_at(self, number: int) -> _Archive:
        """The archive, open at a member or on the way to it."""
        archive = self._archive
        if archive is not None and archive.number != number and not archive.leads_to(number):
            self.close()
        if self._archive is None:
            self._archive = _Archive(self.file, number, self._patience.timeout)
        return self._archive


class SplitReader:
    """Spans of the tokens of a split, across its shards, cheap when asked for front to back."""

    def __init__(
        self,
        index: Index,
        split: str,
        patience: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
    ) -> None:
        self._index, self._shards, self._patience = index, index.split(split).shards, patience
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._number = -1  # of the open shard
        self._reader: ShardReader

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The ids of positions [start, stop) of the split, start < stop, in the shards' dtype."""
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            if number != self._number:
                self._number = number
                file = ShardFile.of(self._index, self._shards[number])
                self._reader = ShardReader(file, self._patience)
            begin, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append(self._reader.read(start - begin, end - begin))
            start = end
        return np.concatenate(parts)


def check_shard(index: Index, shard: Shard) -> None:
    """Compare a whole shard with its checksum. Raises DataError where it is not the one written."""
    file, digest, size = ShardFile.of(index, shard), hashlib.sha256(), 0
    try:
        with contextlib.closing(Stream(file.url, RetryPolicy().timeout)) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
    except (OSError, ValueError) as error:
        raise DataError(_unreadable(error, file)) from None
    if digest.hexdigest() != shard.sha256:
        raise DataError(
            f"{file.url}: {size} bytes with sha256 {digest.hexdigest()[:12]}..., the index says "
            f"{shard.file_bytes} with {shard.sha256[:12]}...; {_REMEDY}"
        )


class _Archive:
    """A shard opened at a member, or at its beginning where it cannot be entered."""

    def __init__(self, file: ShardFile, number: int, timeout: float) -> None:
        from webdataset.tariterators import tar_file_iterator

        self._file, self.stream = file, Stream(file.url, timeout)
        self.number = number if self.stream.seekable else 0  # of the next member
        if self.stream.seekable:
            self.stream.seek(file.members.offsets[number])
        self._entries = tar_file_iterator(self.stream)

    def leads_to(self, number: int) -> bool:
        """Whether the way to a member is to read on; else it is to open the shard there."""
        return self.number < number and not self.stream.seekable

    def member(self, number: int) -> NDArray[Any]:
        """The ids of a member; those before it are read and dropped."""
        while self.number <= number:
            entry = next(self._entries, None)
            if entry is None:
                count = len(self._file.members.tokens)
                raise EOFError(f"it ends after {self.number} of {count} members")
            self.number += 1
        return _checked(entry, self._file, number)

    def close(self) -> None:
        self.stream.close()


class _WrongMember(Exception):
    """A member that is whole but not what the index says."""


def _checked(entry: dict[str, Any] | None, file: ShardFile, number: int) -> NDArray[Any]:
    """The array of a tar entry, if it is the member that the index describes."""
    assert entry is not None
    where, name = f"{file.url}: member {number}", member_name(file.name, number)
    dtype, count = token_dtype(file.vocab_size), file.members.tokens[number]
    if entry["fname"] != name:
        raise _WrongMember(f"{where} is {entry['fname']!r}, not {name!r}; {_REMEDY}")
    if zlib.crc32(entry["data"]) != file.members.crc32[number]:
        raise _WrongMember(f"{where}: the checksum differs from the index; {_REMEDY}")
    try:
        tokens = np.load(io.BytesIO(entry["data"]), allow_pickle=False)
    except ValueError as error:
        raise _WrongMember(
            f"{where}: not a .npy array ({read_error_line(error)}); {_REMEDY}"
        ) from None
    if tokens.dtype != dtype or tokens.shape != (count,):
        raise _WrongMember(
            f"{where} holds {tokens.dtype} {tokens.shape}, the index says {dtype} ({count},); "
            f"{_REMEDY}"
        )
    if tokens.max(initial=0) >= file.vocab_size:
        raise _WrongMember(
            f"{where} holds the id {tokens.max()}, the vocabulary ends at {file.vocab_size - 1}; "
            "prepare the data again with the tokenizer of the index"
        )
    return tokens


def _unreadable(error: Exception, file: ShardFile, where: str = "") -> str:
    if isinstance(error, FileNotFoundError) and is_local(file.url):
        return f"{file.url}: the shard is missing{where}; {_REMEDY}"
    return (
        f"{file.url}: cannot be read{where} ({read_error_line(error)}); the file should have "
        f"{file.file_bytes} bytes: {_REMEDY}"
    )
