"""The index of a prepared corpus: index.json beside the shards, which describes their contents."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from hg_scale.bounded_read import (
    TABLE_BYTES,
    Count,
    FormatError,
    format_errors,
    parse_json,
    read_bounded,
    read_stream,
    validated,
)
from hg_scale.data.errors import DataError
from hg_scale.data.store import DEFAULT_TIMEOUT, ByteStream, read_error_line
from hg_scale.data.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    TokenizerIdentity,
    load_tokenizer,
    stored_dtype,
    token_dtype,
)
from hg_scale.data.urls import join_url, shown_url

INDEX_VERSION = 2  # 1: members hold end-of-document ids, whatever type that takes
INDEX_FILE = "index.json"
SPLITS = ("train", "validation", "test")
_FEW_OFFSETS = 1 << 14  # as many as 64 Mi bytes of text in documents of 4 kB


class _IndexModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Members(_IndexModel):
    """The members of a shard: lists with one entry per member."""

    tokens: list[Count]
    offsets: list[Count]  # byte in the shard where the member's tar header starts
    crc32: list[Count]  # of the member's content

    @model_validator(mode="after")
    def _agree(self) -> Members:
        if not len(self.tokens) == len(self.offsets) == len(self.crc32):
            raise ValueError("tokens, offsets and crc32 differ in length")
        return self


class Shard(_IndexModel):
    """One tar file with consecutive tokens of a split."""

    file: str = Field(pattern=r"^[\w-][\w.-]*$")  # a plain name, beside the index
    tokens: int = Field(ge=1)
    text_bytes: int = Field(ge=0)  # of the source text, without end-of-document tokens
    file_bytes: int = Field(ge=1)  # of the tar file
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the tar file
    members: Members
    documents: str | None = None  # `pack_offsets` of the tokens after which a document ends

    @model_validator(mode="after")
    def _add_up(self) -> Shard:
        if sum(self.members.tokens) != self.tokens:
            raise ValueError(f"its members hold {sum(self.members.tokens)}, not {self.tokens}")
        return self

    def document_ends(self) -> NDArray[np.int64]:
        """Return the positions in the shard just past each end-of-document token, ascending.

        A document may start in the previous shard, or continue in the next one. Raises DataError if
        the index holds others.
        """
        return unpack_document_ends(self.documents, self.file, self.tokens)


class Split(_IndexModel):
    """The training, validation or test split: its shards in the order of the source text."""

    tokens: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    documents: int | None  # how many end in this split; None for a text without documents
    shards: list[Shard]

    @model_validator(mode="after")
    def _add_up(self) -> Split:
        for key in ("tokens", "text_bytes"):
            total = sum(getattr(shard, key) for shard in self.shards)
            if total != getattr(self, key):
                raise ValueError(f"its shards hold {total} {key}, not {getattr(self, key)}")
        return self


class Index(_IndexModel):
    """The contents of a folder of shards, and how they were made."""

    format_version: int = INDEX_VERSION
    tool_version: str
    tokenizer: TokenizerIdentity
    chunk_tokens: int = Field(ge=1)  # tokens per member; the last one of a shard may have fewer
    # Tokens per document where all have the same number (images); no token then ends a document.
    document_tokens: int | None = Field(default=None, ge=1)
    source: dict[str, Any]  # the source and the arguments: equal sources give equal shards
    splits: dict[str, Split]

    _location: str = PrivateAttr("")

    @model_validator(mode="after")
    def _no_split_documents(self) -> Index:
        for split in self.splits.values():
            for shard in split.shards:
                if self.document_tokens and shard.tokens % self.document_tokens:
                    raise ValueError(
                        f"{shard.file} has {shard.tokens} tokens, not a multiple of the document "
                        f"length {self.document_tokens}"
                    )
        return self

    @model_validator(mode="after")
    def _has_ends(self) -> Index:
        for split in self.splits.values():
            for shard in split.shards:
                if self.leaves_out_ends and shard.documents is None:
                    raise ValueError(f"{shard.file} has no ends of documents")
        return self

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type of the ids in the shards."""
        if self.format_version == 1:
            return token_dtype(self.vocab_size)
        return stored_dtype(self.vocab_size, self.eod)

    @property
    def leaves_out_ends(self) -> bool:
        """Whether shards hold 0 in place of end-of-document ids, which do not fit their type."""
        return self.stored_dtype != token_dtype(self.vocab_size)

    @property
    def location(self) -> str:
        """Where the index was read from: a folder, a URL, or `pipe:... {}`. May hold secrets."""
        return self._location

    @property
    def shown(self) -> str:
        """The location as messages may show it."""
        return shown_url(self.location)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def eod(self) -> int | None:
        return self.tokenizer.eod

    @property
    def identity(self) -> str:
        """A checksum of all tokens and the tokenizer; a checkpoint's data position refers to it."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        names = [shard.sha256 for shard in shards]
        if self.leaves_out_ends:
            names += [str(shard.documents) for shard in shards]
        names.append(self.tokenizer.model_dump_json())
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """Return a split that has tokens. Raises DataError where it is missing or empty."""
        split = self.splits.get(name)
        if split is None or not split.tokens:
            filled = ", ".join(key for key, value in self.splits.items() if value.tokens)
            raise DataError(
                f"{shown_url(locate(self.location, INDEX_FILE))}: the split {name!r} is empty; "
                f"use one of {filled or '(none)'} or prepare the data with another --split"
            )
        return split

    def url(self, shard: Shard) -> str:
        """Return the path or URL of a shard, as webdataset opens it."""
        return locate(self.location, shard.file)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) where the documents are images; None where they are text."""
        shape = self.source.get("shape")
        if self.source.get("kind") != "images" or not shape or not self.document_tokens:
            return None
        with format_errors(Path(locate(self.location, INDEX_FILE)), DataError):
            return validated(tuple[Count, Count, Count], shape, ("source", "shape"))

    def open_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens.

        Raises DataError where its model is missing or has another checksum, or its kind is unknown.
        """
        if self.tokenizer.sha256 is None:
            return load_tokenizer(self.tokenizer)
        where = locate(self.location, MODEL_FILE)
        missing = "no such file; copy the model that made the shards there"
        return load_tokenizer(self.tokenizer, _read(where, "a sentencepiece model", missing))

    def text(self) -> str:
        """Return the content of index.json: one line per shard, identical for equal indexes."""
        return _json(self.model_dump()) + "\n"


def read_index(location: str | os.PathLike[str], timeout: float = DEFAULT_TIMEOUT) -> Index:
    """Read the index in a folder (or the file itself), at a URL, or behind `pipe:COMMAND {}`.

    In a pipe, `{}` is replaced by the file to read. A URL or pipe fails after `timeout` seconds
    without a byte. Raises DataError, one line, where this version cannot use the index.
    """
    base = os.fspath(location)
    if base.endswith(INDEX_FILE):
        base = base.removesuffix(INDEX_FILE).rstrip("/") or "."
    address = locate(base, INDEX_FILE)
    where = shown_url(address)
    text = _read(
        address,
        "the index.json of a prepared corpus",
        "no such file; name a folder written by data_prep/*.py (the index is written last: is the "
        "preparation still running?)",
        timeout,
    )
    try:
        tree = parse_json(text)
    except FormatError as error:
        raise DataError(f"{where}: {error}; prepare the data again") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > INDEX_VERSION:
        raise DataError(
            f"{where}: written in format {version} by {tree.get('tool_version', 'a newer version')}"
            f", this version reads up to {INDEX_VERSION}: update hg_scale or prepare again"
        )
    try:
        index = Index.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}; prepare the data again"
        ) from None
    index._location = base
    return index


def is_local(location: str) -> bool:
    """Return whether a location is a local path, not a URL or a pipe."""
    return not location.startswith("pipe:") and "://" not in location


def locate(base: str, file: str) -> str:
    """Return the path or URL of `file` at the location `base`."""
    if base.startswith("pipe:"):
        return base.replace("{}", file)
    return str(Path(base) / file) if is_local(base) else join_url(base, file)


def member_name(shard_file: str, number: int) -> str:
    """Return the name of a member in a shard; webdataset's key is the part before the dot."""
    return f"{shard_file.removesuffix('.tar')}-{number:06d}.npy"


def pack_offsets(offsets: Sequence[int] | NDArray[np.int64]) -> str:
    """Pack ascending positions: base64 of zlib of their differences as little-endian uint32.

    Many are compressed fast: level 9 takes microseconds for each, for a tenth less.
    """
    steps = np.diff(np.asarray(offsets, np.int64), prepend=0).astype("<u4")
    level = 9 if len(steps) <= _FEW_OFFSETS else 1
    return base64.b64encode(zlib.compress(steps.tobytes(), level)).decode()


def unpack_document_ends(packed: str | None, file: str, tokens: int) -> NDArray[np.int64]:
    """Return the positions past each end of a document in a shard `file` of so many tokens.

    Raises DataError if the index holds others.
    """
    if not packed:
        return np.empty(0, np.int64)
    try:
        ends = unpack_offsets(packed, tokens)
    except ValueError as error:
        raise DataError(f"{file}: ends of documents in its index: {error}") from None
    if ends.size and ends[-1] > tokens:
        raise DataError(f"{file}: its index has documents that end after its last token")
    return ends


def unpack_offsets(text: str, limit: int) -> NDArray[np.int64]:
    """Return the positions packed by `pack_offsets`. Raises ValueError if over `limit` of them."""
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(base64.b64decode(text), 4 * limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(data) > 4 * limit or len(data) % 4 or not unpack.eof:
        raise ValueError(f"expected complete positions, at most {limit:,}")
    return np.cumsum(np.frombuffer(data, "<u4"), dtype=np.int64)


def _read(where: str, expected: str, missing: str, timeout: float = DEFAULT_TIMEOUT) -> bytes:
    """Return the content of a local or remote file."""
    try:
        if is_local(where):
            return read_bounded(Path(where), TABLE_BYTES)
        with contextlib.closing(ByteStream(where, timeout)) as stream:
            return read_stream(stream, TABLE_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and is_local(where):
            raise DataError(f"{where}: {missing}") from None
        raise DataError(
            f"{shown_url(where)}: cannot be read ({read_error_line(error)}); expected {expected}: "
            "check the location and that it can be reached"
        ) from None


def _json(value: Any, depth: int = 0) -> str:
    """Return JSON indented down to the list of shards, with one line per shard for diffs."""
    if depth == 4 or not value or not isinstance(value, dict | list):
        return json.dumps(value, separators=(", ", ": "))
    pad = "  " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_json(item, depth + 1)}" for key, item in value.items()]
        left, right = "{}"
    else:
        items = [_json(item, depth + 1) for item in value]
        left, right = "[]"
    return left + "".join(f"\n{pad}{item}," for item in items)[:-1] + f"\n{pad[2:]}{right}"
