"""Read shards (written by `preparation/shard_writer.py`) through webdataset.

A local file is opened at any member; a URL or a pipe is read from its start. Every member is
checked against the index: name, checksum, type, length and largest id. Nothing is unpacked to disk.
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
    unpack_document_ends,
)
from hg_scale.data.store import DEFAULT_TIMEOUT, ByteStream, read_error_line
from hg_scale.data.tokenizer import token_dtype
from hg_scale.data.urls import shown_url

_REMEDY = "copy the shard again or prepare the data again"
_BACK_OFF = 0.5, 30.0  # seconds before the first retry, doubled for each further one; maximum


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failed read is retried, and after how many seconds without a byte it fails."""

    retries: int = 0
    timeout: float = DEFAULT_TIMEOUT


@dataclass(frozen=True)
class ShardFile:
    """The part of a shard's index entry that reading needs; small, for sending to a worker."""

    url: str
    name: str
    file_bytes: int
    vocab_size: int
    members: Members
    dtype: np.dtype[Any]  # of its members
    left_out: str | None  # packed ends of documents, whose ids (the last) the members leave out

    @property
    def shown(self) -> str:
        """The URL as messages may show it."""
        return shown_url(self.url)

    @classmethod
    def from_index(cls, index: Index, shard: Shard) -> ShardFile:
        left_out = shard.documents if index.leaves_out_ends else None
        return cls(
            index.url(shard), shard.file, shard.file_bytes, index.vocab_size, shard.members,
            index.stored_dtype, left_out,
        )  # fmt: skip


class UnusableSpan(NamedTuple):
    """Tokens [start, stop) that cannot be used; the message names shard and member in one line."""

    start: int
    stop: int
    message: str


class LoadedTokens(NamedTuple):
    """Ids (n,) of dtype `token_dtype`, and the spans of them that cannot be used (set to zero)."""

    tokens: NDArray[Any]
    unusable: list[UnusableSpan]


class ShardReader:
    """Reads spans of the tokens of one shard; fast when they are read front to back.

    Retries `retry_policy.retries` times in a row, with growing pauses: behind a URL or a pipe
    after every error, in a local file after errors of the file system. `closing` ends the retries.
    """

    def __init__(
        self,
        file: ShardFile,
        retry_policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
        closing: threading.Event | None = None,
    ) -> None:
        self.file, self._retry_policy = file, retry_policy
        self._closing = closing or threading.Event()
        self._starts = np.cumsum([0, *file.members.tokens])
        self._ends = unpack_document_ends(file.left_out, file.shown, int(self._starts[-1])) - 1
        self._archive: _Archive | None = None
        self._retries_left = retry_policy.retries  # reset by every member that reads well
        self._last: tuple[int, NDArray[Any] | str] = -1, ""  # a member, or its error message
        self._end: tuple[int, str] | None = None  # of a pipe: the first member out of reach

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of positions [start, stop). Raises DataError if any cannot be used."""
        loaded = self.load(start, stop)
        if loaded.unusable:
            raise DataError(loaded.unusable[0].message)
        return loaded.tokens

    def load(self, start: int, stop: int) -> LoadedTokens:
        """Return the ids of positions [start, stop), and the spans that cannot be used.

        The positions of these spans are relative to `start`.
        """
        tokens = np.zeros(stop - start, token_dtype(self.file.vocab_size))
        unusable: list[UnusableSpan] = []
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        for number in range(int(first), int(last) + 1):
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            target = slice(max(begin, start) - start, min(end, stop) - start)
            content = self._member(number)
            if isinstance(content, str):
                unusable.append(UnusableSpan(target.start, target.stop, content))
            else:
                tokens[target] = content[max(start - begin, 0) : stop - begin]
        return LoadedTokens(tokens, unusable)

    def close(self) -> None:
        """Close the file."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def abort(self) -> None:
        """Kill the process behind a pipe; a read in another thread then fails."""
        if (archive := self._archive) is not None:
            archive.stream.kill()

    def _member(self, number: int) -> NDArray[Any] | str:
        """Return the ids of a member, or its error message."""
        if self._last[0] != number:
            if self._end and number >= self._end[0]:
                return self._end[1]
            self._last = number, self._fetch(number)
        return self._last[1]

    def _fetch(self, number: int) -> NDArray[Any] | str:
        """Read a member, with retries where they may help."""
        remote, tries = not is_local(self.file.url), 0
        pause, longest = _BACK_OFF
        while True:
            tries += 1
            try:
                content = self._put_ends(self._open_at(number).member(number), number)
                self._retries_left = self._retry_policy.retries
                return content
            except _WrongMember as error:
                message, retry, ended = str(error), remote, False
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                message, ended = _unreadable(error, self.file, f" at member {number}"), remote
                retry = remote or isinstance(error, OSError)
                self.close()
            if not retry or tries > self._retries_left or self._closing.is_set():
                break
            self.close()
            self._closing.wait(pause)
            pause = min(2 * pause, longest)
        if retry:
            self._retries_left = 0  # until a member reads well, the next ones get one try each
        if tries > 1:
            message += f" (tried {tries} times)"
        if ended:
            self._end = number, message
        return message

    def _put_ends(self, stored: NDArray[Any], number: int) -> NDArray[Any]:
        """Return the ids of a member with the end-of-document ids that it leaves out."""
        if self.file.left_out is None:
            return stored
        begin = int(self._starts[number])
        first, last = np.searchsorted(self._ends, [begin, begin + len(stored)])
        ends = self._ends[first:last] - begin
        if stored[ends].any():
            raise _WrongMember(
                f"{self.file.shown}: member {number} has other ids where documents end in the "
                f"index; {_REMEDY}"
            )
        tokens = stored.astype(token_dtype(self.file.vocab_size))
        tokens[ends] = self.file.vocab_size - 1
        return tokens

    def _open_at(self, number: int) -> _Archive:
        """Return the archive, open at a member or before it."""
        archive = self._archive
        if archive is not None and archive.number != number and not archive.reads_on_to(number):
            self.close()
        if self._archive is None:
            self._archive = _Archive(self.file, number, self._retry_policy.timeout)
        return self._archive


class SplitReader:
    """Reads spans of the tokens of a split, across shards; fast when they are read in order."""

    def __init__(
        self,
        index: Index,
        split: str,
        retry_policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
    ) -> None:
        self._index, self._shards = index, index.split(split).shards
        self._retry_policy = retry_policy
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._number = -1  # of the open shard
        self._reader: ShardReader

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of positions [start, stop) of the split, start < stop.

        Raises DataError where one cannot be used.
        """
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            if number != self._number:
                self._number = number
                file = ShardFile.from_index(self._index, self._shards[number])
                self._reader = ShardReader(file, self._retry_policy)
            begin, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append(self._reader.read(start - begin, end - begin))
            start = end
        return np.concatenate(parts)


def check_shard_checksum(index: Index, shard: Shard) -> None:
    """Compare a shard file with the sha256 in the index. Raises DataError if they differ."""
    file, digest, size = ShardFile.from_index(index, shard), hashlib.sha256(), 0
    try:
        with contextlib.closing(ByteStream(file.url, RetryPolicy().timeout)) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
    except (OSError, ValueError) as error:
        raise DataError(_unreadable(error, file)) from None
    if digest.hexdigest() != shard.sha256:
        raise DataError(
            f"{file.shown}: {size} bytes with sha256 {digest.hexdigest()[:12]}..., the index has "
            f"{shard.file_bytes} with {shard.sha256[:12]}...; {_REMEDY}"
        )


class _Archive:
    """A shard opened at a member, or at its start where it is not seekable."""

    def __init__(self, file: ShardFile, number: int, timeout: float) -> None:
        from webdataset.tariterators import tar_file_iterator

        self._file, self.stream = file, ByteStream(file.url, timeout)
        self.number = number if self.stream.seekable else 0  # of the next member
        if self.stream.seekable:
            self.stream.seek(file.members.offsets[number])
        self._entries = tar_file_iterator(self.stream)

    def reads_on_to(self, number: int) -> bool:
        """Whether to read on to a member, rather than to open the shard there."""
        return self.number < number and not self.stream.seekable

    def member(self, number: int) -> NDArray[Any]:
        """Return the ids of a member; members before it are read and dropped."""
        while self.number <= number:
            entry = next(self._entries, None)
            if entry is None:
                count = len(self._file.members.tokens)
                raise EOFError(f"it ends after {self.number} of {count} members")
            self.number += 1
        return _decode_member(entry, self._file, number)

    def close(self) -> None:
        self.stream.close()


class _WrongMember(Exception):
    """A complete member that does not match the index."""


def _decode_member(entry: dict[str, Any] | None, file: ShardFile, number: int) -> NDArray[Any]:
    """Return the array of a tar entry. Raises _WrongMember where it differs from the index."""
    assert entry is not None
    where, name = f"{file.shown}: member {number}", member_name(file.name, number)
    dtype, count = file.dtype, file.members.tokens[number]
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
            f"{where} holds {tokens.dtype} {tokens.shape}, the index has {dtype} ({count},); "
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
        return f"{file.shown}: the shard is missing{where}; {_REMEDY}"
    return (
        f"{file.shown}: cannot be read{where} ({read_error_line(error)}); the file should have "
        f"{file.file_bytes} bytes: {_REMEDY}"
    )
