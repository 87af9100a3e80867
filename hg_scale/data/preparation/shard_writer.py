"""Writing shards: token chunks into tar files that webdataset reads.

A member is a `.npy` array of `chunk_tokens` ids, so `webdataset.WebDataset(url).decode()` reads
the shards too. Headers are plain ustar with every varying field zero: equal tokens, equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.index import Members, Shard, Split, member_name, pack_offsets
from hg_scale.data.tokenizer import Tokenizer, token_dtype

PARTIAL = ".partial"  # a file that is still being written ends so
_BLOCK = tarfile.BLOCKSIZE
_SMALL, _LARGE = 2**20, 2**26  # tokens of a shard by default, in small and in huge corpora


class ShardWriter:
    """One tar file of tokens. It appears under its name only when it is whole and on the disk."""

    def __init__(self, path: Path, tokenizer: Tokenizer, *, chunk_tokens: int) -> None:
        self.tokens = 0  # written so far
        self._path, self._tokenizer = path, tokenizer
        self._partial = partial_path(path)
        self._file = self._partial.open("wb")
        self._chunk = np.empty(chunk_tokens, token_dtype(tokenizer.vocab_size))
        self._filled = 0  # tokens in the chunk
        self._hash = hashlib.sha256()
        self._size = 0
        self._members: dict[str, list[int]] = {"tokens": [], "offsets": [], "crc32": []}
        self._ends: list[NDArray[np.int64]] = []

    def write(self, tokens: NDArray[Any]) -> None:
        """Append ids (n,)."""
        while len(tokens):
            part = tokens[: len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if self._filled == len(self._chunk):
                self._add_member()

    def close(self, text_bytes: int) -> Shard:
        """End the archive, make it durable, give it its name. `text_bytes`: what it stands for."""
        if self._filled:
            self._add_member()
        self._put(bytes(2 * _BLOCK))
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        commit(self._partial, self._path)
        return Shard(
            file=self._path.name,
            tokens=self.tokens,
            text_bytes=text_bytes,
            file_bytes=self._size,
            sha256=self._hash.hexdigest(),
            members=Members(**self._members),
            documents=pack_offsets(np.concatenate(self._ends)) if self._ends else None,
        )

    def abandon(self) -> None:
        """Leave no trace."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _add_member(self) -> None:
        tokens, self._filled = self._chunk[: self._filled], 0
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, tokens, version=(1, 0))
        content = buffer.getvalue()
        header = tarfile.TarInfo(member_name(self._path.name, len(self._members["tokens"])))
        header.size = len(content)
        if self._tokenizer.eod is not None:
            start = sum(self._members["tokens"])
            ends = np.flatnonzero(tokens == self._tokenizer.eod) + 1 + start
            self._ends.append(ends.astype(np.int64))
        self._members["tokens"].append(len(tokens))
        self._members["offsets"].append(self._size)
        self._members["crc32"].append(zlib.crc32(content))
        self._put(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


class SplitWriter:
    """Writes the tokens of one split as shards of exactly `shard_tokens` (the last has the rest).

    The text they stand for is counted by the tokenizer, so it has to be one that round-trips.
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
        self._chunk_tokens, self._shard_tokens = chunk_tokens, shard_tokens
        self._shards: list[Shard] = []
        self._open: ShardWriter | None = None
        self._text_bytes = 0  # of the open shard

    def write(self, tokens: NDArray[Any]) -> None:
        """Append ids (n,)."""
        while len(tokens):
            if self._open is None:
                path = self._folder / shard_name(self._split, len(self._shards))
                self._open = ShardWriter(path, self._tokenizer, chunk_tokens=self._chunk_tokens)
            part = tokens[: self._shard_tokens - self._open.tokens]
            self._open.write(part)
            self._text_bytes += self._tokenizer.count_bytes(part)
            tokens = tokens[len(part) :]
            if self._open.tokens == self._shard_tokens:
                self._end_shard()

    def close(self) -> Split:
        """Finish the last shard. The split's part of the index."""
        if self._open is not None:
            self._end_shard()
        return make_split(self._shards, with_documents=self._tokenizer.eod is not None)

    def _end_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close(self._text_bytes))
        self._open, self._text_bytes = None, 0


def default_shard_tokens(tokens: int, chunk_tokens: int) -> int:
    """Tokens of a shard where none are given.

    Shards of equal size, their number a multiple of 16 (the canonical streams): of about 1 Mi
    tokens in a small corpus, 256 growing ones in a larger one, more where they would pass 64 Mi;
    fewer than 16 only where a shard would be less than a chunk.
    """
    wanted = max(min(tokens // _SMALL, 256), -(-tokens // _LARGE))
    wanted = max(16, -(-wanted // 16) * 16)
    return max(1, -(-tokens // max(1, min(wanted, tokens // chunk_tokens))))


def shard_name(split: str, number: int) -> str:
    """The file of a shard."""
    return f"{split}-{number:05d}.tar"


def make_split(
    shards: list[Shard], *, with_documents: bool, document_tokens: int | None = None
) -> Split:
    """What the index says of a split with these shards.

    Its documents are counted by their ends, or by their length where all have the same.
    """
    tokens = sum(shard.tokens for shard in shards)
    documents: int | None = None
    if document_tokens:
        documents = tokens // document_tokens
    elif with_documents:
        documents = sum(len(shard.document_ends()) for shard in shards)
    return Split(
        tokens=tokens,
        text_bytes=sum(shard.text_bytes for shard in shards),
        documents=documents,
        shards=shards,
    )


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    commit(partial, path)


def partial_path(path: Path) -> Path:
    """Where to write what will be `path`: a name that no other process uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def commit(partial: Path, path: Path) -> None:
    """Rename `partial`, already on the disk, to `path`, and put the rename on the disk too."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
