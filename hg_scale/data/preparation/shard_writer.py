"""Write shards: tar files of token chunks, also readable with webdataset.

A member is a `.npy` array of `chunk_tokens` ids, as `webdataset.WebDataset(url).decode()` reads
it. Where the end-of-document id does not fit the type of the others, the array has 0 in its place,
and the index says where. Headers are plain ustar with every varying field zero, so equal tokens
give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.atomic_write import commit, partial_path
from hg_scale.data.index import Members, Shard, Split, member_name, pack_offsets
from hg_scale.data.tokenizer import Tokenizer, stored_dtype, token_dtype

_BLOCK = tarfile.BLOCKSIZE
_SMALL, _LARGE = 2**20, 2**26  # default tokens per shard in small and in huge corpora


class ShardWriter:
    """One tar file of tokens; it appears under its name once it is complete and synced.

    The caller syncs the folder.
    """

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
        """Finish the archive, which encodes `text_bytes` bytes of text. Returns its index entry."""
        if self._filled:
            self._add_member()
        self._put(bytes(2 * _BLOCK))
        commit(self._file, self._path, sync_folder=False)  # once for all, before the index
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
        """Remove the unfinished archive."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _add_member(self) -> None:
        tokens, self._filled = self._chunk[: self._filled], 0
        dtype = stored_dtype(self._tokenizer.vocab_size, self._tokenizer.eod)
        start = sum(self._members["tokens"])
        if self._tokenizer.eod is not None:
            ends = np.flatnonzero(tokens == self._tokenizer.eod)
            self._ends.append(ends.astype(np.int64) + 1 + start)
            if dtype != tokens.dtype:
                tokens[ends] = 0
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, tokens.astype(dtype, copy=False), version=(1, 0))
        content = buffer.getvalue()
        header = tarfile.TarInfo(member_name(self._path.name, len(self._members["tokens"])))
        header.size = len(content)
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

    The tokenizer counts the bytes of text of the tokens, so it has to be one that round-trips.
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
        """Finish the last shard. Returns the split's entry of the index."""
        if self._open is not None:
            self._end_shard()
        return make_split(self._shards, with_documents=self._tokenizer.eod is not None)

    def _end_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close(self._text_bytes))
        self._open, self._text_bytes = None, 0


def default_shard_tokens(tokens: int, chunk_tokens: int) -> int:
    """Return the tokens per shard where the user sets none.

    Shards have equal size, and their number is a multiple of 16 (the canonical streams): shards of
    about 1 Mi tokens, then 256 larger ones, then more of at most 64 Mi tokens. There are fewer than
    16 only where a shard would be smaller than a chunk.
    """
    shards = max(min(tokens // _SMALL, 256), -(-tokens // _LARGE))
    shards = max(16, -(-shards // 16) * 16)
    return max(1, -(-tokens // max(1, min(shards, tokens // chunk_tokens))))


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05d}.tar"


def make_split(
    shards: list[Shard], *, with_documents: bool, document_tokens: int | None = None
) -> Split:
    """Return the index entry of a split with these shards.

    Its documents are counted by their ends, or by `document_tokens` where all are equally long.
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
