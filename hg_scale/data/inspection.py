"""Looking at prepared data: what is there, whether it is whole, and some of it to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, Shard
from hg_scale.data.tokenizer import SentencePieceTokenizer, Tokenizer

END_MARK = "\n<end of document>\n"
_SHADES = " .:-=+*#%@"  # from dark to light
# A terminal would obey control characters: their pictures stand for them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421
} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # fmt: skip


class SampleWindow(NamedTuple):
    """A window to read: where it begins in its split, and what it says."""

    position: int
    text: str


def tokenizer_line(index: Index) -> str:
    """What the index says of its tokenizer, and whether it gives every text back."""
    identity = index.tokenizer
    end = "no id ends a document" if index.eod is None else f"id {index.eod} ends a document"
    line = f"{identity.name}, {identity.vocab_size:,} ids, {end}"
    if identity.sha256:
        line += f", model sha256 {identity.sha256[:12]}"
    tokenizer = index.open_tokenizer()
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.obstacles:
        return f"{line}; does not give text back as it was: {', '.join(tokenizer.obstacles)}"
    return f"{line}; gives every text back"


def shard_problems(index: Index, shard: Shard, tokenizer: Tokenizer) -> list[str]:
    """Read a whole shard: its faults, a line each naming shard and member; none if it is whole."""
    from hg_scale.data.shards import ShardFile, ShardReader, check_shard

    reader = ShardReader(ShardFile.of(index, shard))
    try:
        tokens, faults = reader.load(0, shard.tokens)
    finally:
        reader.close()
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return [faults[0].message + more]
    found, where = [], index.url(shard)
    if index.eod is not None:
        ends = np.flatnonzero(tokens == index.eod) + 1
        if not np.array_equal(ends, shard.document_ends()):
            found.append(
                f"{where}: {len(ends)} documents end there, not the {len(shard.document_ends())} "
                "of the index; copy the index that belongs to the shards"
            )
    if tokenizer.round_trips and (size := tokenizer.count_bytes(tokens)) != shard.text_bytes:
        found.append(
            f"{where}: its tokens stand for {size} bytes of text, the index says "
            f"{shard.text_bytes}; copy the index that belongs to the shards"
        )
    try:
        check_shard(index, shard)
    except DataError as error:
        found.append(str(error))
    return found


def sample_windows(
    index: Index, split: str, *, windows: int, length: int | None, seed: int
) -> Iterator[SampleWindow]:
    """Windows of a split at drawn positions, decoded; images where every document is one.

    Raises DataError where the split is empty or cannot be read.
    """
    from hg_scale.data.shards import SplitReader

    reader, total = SplitReader(index, split), index.split(split).tokens
    random = np.random.default_rng(seed)
    shape = index.source.get("shape") if index.document_tokens else None
    length = min(length or index.document_tokens or 512, total)
    tokenizer = index.open_tokenizer()
    for _ in range(windows):
        if shape and index.document_tokens:
            number = int(random.integers(total // index.document_tokens))
            start = number * index.document_tokens
            tokens = reader.read(start, start + index.document_tokens)
            yield SampleWindow(start, draw_image(tokens.reshape(shape)))
        else:
            start = int(random.integers(total - length + 1))
            yield SampleWindow(start, decode(reader.read(start, start + length), tokenizer))


def decode(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> str:
    """Text to read: the ends of documents are marked, what is not UTF-8 is U+FFFD, control
    characters are pictures of themselves."""
    parts = [tokens]
    if tokenizer.eod is not None:
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eod) + 1)
    texts = [tokenizer.decode(part).decode(errors="replace") for part in parts]
    return END_MARK.join(map(printable, texts))


def draw_image(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, C) in characters, two a pixel, by its brightness."""
    gray = pixels.astype(np.float64).mean(axis=2)
    top = max(float(gray.max()), 1.0)
    shades = np.minimum(gray / top * len(_SHADES), len(_SHADES) - 1).astype(int)
    return "\n".join("".join(_SHADES[shade] * 2 for shade in row) for row in shades.tolist())


def printable(text: str) -> str:
    """The text as a terminal or a page may have it: pictures stand for control characters."""
    return text.translate(_PICTURES)
