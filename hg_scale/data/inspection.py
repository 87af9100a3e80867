"""Inspect prepared data: describe the tokenizer, verify shards, decode samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, Shard
from hg_scale.data.shards import ShardFile, ShardReader, SplitReader, check_shard_checksum
from hg_scale.data.tokenizer import SentencePieceTokenizer, Tokenizer
from hg_scale.data.urls import shown_url

END_MARK = "\n<end of document>\n"
_SHADES = " .:-=+*#%@"  # from dark to light
# A terminal would execute control characters, so Unicode's pictures of them are shown instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421
} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # fmt: skip


class DataSample(NamedTuple):
    """A decoded part of a split, and the position of its first token."""

    position: int
    text: str


def tokenizer_line(index: Index) -> str:
    """Describe the tokenizer of an index in one line, with whether it is lossless."""
    identity = index.tokenizer
    end = "no id ends a document" if index.eod is None else f"id {index.eod} ends a document"
    line = f"{identity.name}, {identity.vocab_size:,} ids, {end}"
    if identity.sha256:
        line += f", model sha256 {identity.sha256[:12]}"
    tokenizer = index.open_tokenizer()
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.obstacles:
        return f"{line}; lossy: {', '.join(tokenizer.obstacles)}"
    return f"{line}; lossless"


def shard_problems(index: Index, shard: Shard, tokenizer: Tokenizer) -> list[str]:
    """Read a complete shard; return its problems, a line each with shard and member."""
    reader = ShardReader(ShardFile.from_index(index, shard))
    try:
        tokens, unusable = reader.load(0, shard.tokens)
    finally:
        reader.close()
    if unusable:
        more = f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""
        return [unusable[0].message + more]
    problems, where = [], shown_url(index.url(shard))
    if index.eod is not None:
        ends = np.flatnonzero(tokens == index.eod) + 1
        if not np.array_equal(ends, shard.document_ends()):
            problems.append(
                f"{where}: {len(ends)} documents end in it, not the {len(shard.document_ends())} "
                "of the index; copy the index that belongs to the shards"
            )
    if tokenizer.round_trips and (size := tokenizer.count_bytes(tokens)) != shard.text_bytes:
        problems.append(
            f"{where}: its tokens decode to {size} bytes of text, the index has "
            f"{shard.text_bytes}; copy the index that belongs to the shards"
        )
    try:
        check_shard_checksum(index, shard)
    except DataError as error:
        problems.append(str(error))
    return problems


def draw_samples(
    index: Index, split: str, *, count: int, length: int | None, seed: int
) -> Iterator[DataSample]:
    """Yield parts of a split at random positions, decoded; pictures where documents are images.

    Raises DataError where the split is empty or cannot be read.
    """
    reader, total = SplitReader(index, split), index.split(split).tokens
    random = np.random.default_rng(seed)
    shape = index.source.get("shape") if index.document_tokens else None
    length = min(length or index.document_tokens or 512, total)
    tokenizer = index.open_tokenizer()
    for _ in range(count):
        if shape and index.document_tokens:
            number = int(random.integers(total // index.document_tokens))
            start = number * index.document_tokens
            tokens = reader.read(start, start + index.document_tokens)
            yield DataSample(start, draw_image(tokens.reshape(shape)))
        else:
            start = int(random.integers(total - length + 1))
            yield DataSample(start, display_text(reader.read(start, start + length), tokenizer))


def display_text(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> str:
    """Decode tokens for reading.

    Ends of documents are marked, invalid UTF-8 becomes U+FFFD, control characters their pictures.
    """
    parts = [tokens]
    if tokenizer.eod is not None:
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eod) + 1)
    texts = [tokenizer.decode(part).decode(errors="replace") for part in parts]
    return END_MARK.join(map(printable, texts))


def draw_image(pixels: NDArray[np.uint8]) -> str:
    """Draw an image (H, W, C) in characters, two per pixel, by brightness."""
    gray = pixels.astype(np.float64).mean(axis=2)
    top = max(float(gray.max()), 1.0)
    shades = np.minimum(gray / top * len(_SHADES), len(_SHADES) - 1).astype(int)
    return "\n".join("".join(_SHADES[shade] * 2 for shade in row) for row in shades.tolist())


def printable(text: str) -> str:
    """Return text that is safe on a terminal: control characters become pictures of themselves."""
    return text.translate(_PICTURES)
