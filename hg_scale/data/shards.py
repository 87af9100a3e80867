"""Reading shards (`shard_writer` writes them), front to back, through webdataset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, Shard, is_local, member_name
from hg_scale.data.tokenizer import token_dtype

_REMEDY = "copy the shard again or prepare the data again"


def read_members(index: Index, shard: Shard, first: int = 0) -> Iterator[NDArray[Any]]:
    """The ids (n,) of each member of a shard, from member number `first` on.

    A local file is entered at that member; from a URL or a pipe the ones before are read and
    dropped. Raises DataError, naming shard and member, where the content is not what the index
    says.
    """
    from webdataset.gopen import gopen  # imports torch, which preparing does without
    from webdataset.tariterators import tar_file_iterator

    url, number = index.url(shard), 0
    dtype = token_dtype(index.vocab_size)
    try:
        with contextlib.closing(_Quiet(gopen(url))) as stream:
            if is_local(url):
                stream.file.seek(shard.members.offsets[first])
                number = first
            for entry in tar_file_iterator(stream.file):
                if number == len(shard.members.tokens):
                    break
                if number >= first:
                    yield _checked(entry, index, shard, number, dtype)
                number += 1
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise _unreadable(error, url, shard, f" at member {number}") from None
    if number < len(shard.members.tokens):
        raise DataError(
            f"{url}: ends after {number} of {len(shard.members.tokens)} members; the file should "
            f"have {shard.file_bytes} bytes: {_REMEDY}"
        )


class ShardReader:
    """Spans of the tokens of one shard, cheap when asked for front to back."""

    def __init__(self, index: Index, shard: Shard) -> None:
        self._index, self._shard = index, shard
        self._starts = np.cumsum([0, *shard.members.tokens])
        self._members: Iterator[NDArray[Any]] | None = None
        self._start = 0  # position of the first held token
        self._held: NDArray[Any] = np.empty(0, token_dtype(index.vocab_size))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The ids of positions [start, stop) of the shard, in the shard's dtype."""
        if self._members is None or start < self._start:
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            self._members = read_members(self._index, self._shard, first)
            self._start, self._held = int(self._starts[first]), self._held[:0]
        parts, end = [self._held], self._start + len(self._held)
        try:
            while end < stop:
                parts.append(next(self._members))
                end += len(parts[-1])
        except DataError:
            self._members = None  # the next read opens the shard again
            raise
        self._held = np.concatenate(parts)[start - self._start :]
        self._start = start
        return self._held[: stop - start]


class SplitReader:
    """Spans of the tokens of a split, across its shards, cheap when asked for front to back."""

    def __init__(self, index: Index, split: str) -> None:
        self._index, self._shards = index, index.split(split).shards
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
                self._reader = ShardReader(self._index, self._shards[number])
            begin, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append(self._reader.read(start - begin, end - begin))
            start = end
        return np.concatenate(parts)


def check_shard(index: Index, shard: Shard) -> None:
    """Compare a whole shard with its checksum. Raises DataError where it is not the one written."""
    from webdataset.gopen import gopen

    url, digest, size = index.url(shard), hashlib.sha256(), 0
    try:
        with contextlib.closing(_Quiet(gopen(url))) as stream:
            while block := stream.file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except (OSError, ValueError) as error:
        raise _unreadable(error, url, shard) from None
    if digest.hexdigest() != shard.sha256:
        raise DataError(
            f"{url}: {size} bytes with sha256 {digest.hexdigest()[:12]}..., the index says "
            f"{shard.file_bytes} with {shard.sha256[:12]}...; {_REMEDY}"
        )


class _Quiet:
    """A stream of webdataset's that closes without complaint: a pipe left early exits with a
    signal, and whether everything was read is checked against the index instead."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def _checked(
    entry: dict[str, Any], index: Index, shard: Shard, number: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The array of a tar entry, if it is the member that the index describes."""
    where = f"{index.url(shard)}: member {number}"
    name = member_name(shard.file, number)
    if entry["fname"] != name:
        raise DataError(f"{where} is {entry['fname']!r}, not {name!r}; {_REMEDY}")
    if zlib.crc32(entry["data"]) != shard.members.crc32[number]:
        raise DataError(f"{where}: the checksum differs from the index; {_REMEDY}")
    try:
        tokens = np.load(io.BytesIO(entry["data"]), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{where}: not a .npy array ({_first_line(error)}); {_REMEDY}") from None
    if tokens.dtype != dtype or tokens.shape != (shard.members.tokens[number],):
        raise DataError(
            f"{where} holds {tokens.dtype} {tokens.shape}, the index says {dtype} "
            f"({shard.members.tokens[number]},); {_REMEDY}"
        )
    if tokens.max(initial=0) >= index.vocab_size:
        raise DataError(
            f"{where} holds the id {tokens.max()}, the vocabulary ends at {index.vocab_size - 1}; "
            "prepare the data again with the tokenizer of the index"
        )
    return tokens


def _unreadable(error: Exception, url: str, shard: Shard, where: str = "") -> DataError:
    if isinstance(error, FileNotFoundError) and is_local(url):
        return DataError(f"{url}: the shard is missing; {_REMEDY}")
    return DataError(
        f"{url}: cannot be read{where} ({_first_line(error)}); the file should have "
        f"{shard.file_bytes} bytes: {_REMEDY}"
    )


def _first_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.split(" @ ")[0].splitlines()[0]  # webdataset appends the stream's repr after an @
