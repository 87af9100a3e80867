"""Tar shards of token chunks: written once, then read front to back through webdataset.

A member is a `.npy` array of `chunk_tokens` ids, so `webdataset.WebDataset(url).decode()` reads
the shards too. Headers are plain ustar with every varying field zero: equal tokens, equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import (
    Index,
    Members,
    Shard,
    Split,
    is_local,
    member_name,
    pack_offsets,
)
from hg_scale.data.tokenizer import Tokenizer, token_dtype

PARTIAL = ".partial"  # a file that is still being written ends so
_BLOCK = tarfile.BLOCKSIZE
_REMEDY = "copy the shard again or prepare the data again"


class SplitWriter:
    """Writes the tokens of one split as shards of exactly `shard_tokens` (the last has the rest).

    A shard appears under its name only when it is whole and on the disk.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        *,
        chunk_tokens: int,
        shard_tokens: int,
    ) -> None:
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._shard_tokens = shard_tokens
        self._chunk = np.empty(chunk_tokens, token_dtype(tokenizer.vocab_size))
        self._filled = 0  # tokens in the chunk
        self._shards: list[Shard] = []
        self._open: _ShardFile | None = None

    def write(self, tokens: NDArray[Any]) -> None:
        """Append ids (n,)."""
        while len(tokens):
            if self._open is None:
                name = f"{self._split}-{len(self._shards):05d}.tar"
                self._open = _ShardFile(self._folder / name, self._tokenizer)
            left = self._shard_tokens - self._open.tokens - self._filled
            part = tokens[: min(left, len(self._chunk) - self._filled)]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == len(self._chunk) or len(part) == left:
                self._open.add(self._chunk[: self._filled])
                self._filled = 0
            if len(part) == left:
                self._end_shard()

    def close(self) -> Split:
        """Finish the last shard. The split's part of the index."""
        if self._open is not None:
            if self._filled:
                self._open.add(self._chunk[: self._filled])
            self._end_shard()
        shards = self._shards
        return Split(
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            documents=None
            if self._tokenizer.eod is None
            else sum(len(shard.document_ends()) for shard in shards),
            shards=shards,
        )

    def _end_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close())
        self._open = None
        self._filled = 0


class _ShardFile:
    """One tar file being written, under a temporary name."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self._path, self._tokenizer = path, tokenizer
        self._partial = path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._size = self._text_bytes = 0
        self._members: dict[str, list[int]] = {"tokens": [], "offsets": [], "crc32": []}
        self._ends: list[NDArray[np.int64]] = []

    def add(self, tokens: NDArray[Any]) -> None:
        """Append a member with these ids (n,)."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, tokens, version=(1, 0))
        content = buffer.getvalue()
        header = tarfile.TarInfo(member_name(self._path.name, len(self._members["tokens"])))
        header.size = len(content)
        self._members["tokens"].append(len(tokens))
        self._members["offsets"].append(self._size)
        self._members["crc32"].append(zlib.crc32(content))
        self._put(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK))
        if self._tokenizer.eod is not None:
            ends = np.flatnonzero(tokens == self._tokenizer.eod) + 1 + self.tokens
            self._ends.append(ends.astype(np.int64))
        self._text_bytes += self._tokenizer.count_bytes(tokens)
        self.tokens += len(tokens)

    def close(self) -> Shard:
        """End the archive, make it durable, give it its name."""
        self._put(bytes(2 * _BLOCK))
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        commit(self._partial, self._path)
        return Shard(
            file=self._path.name,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            file_bytes=self._size,
            sha256=self._hash.hexdigest(),
            members=Members(**self._members),
            documents=pack_offsets(np.concatenate(self._ends)) if self._ends else None,
        )

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    commit(partial, path)


def commit(partial: Path, path: Path) -> None:
    """Rename `partial`, already on the disk, to `path`, and put the rename on the disk too."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
