"""Tokens of documents, for the shards."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, token_dtype

_PIECE = 1 << 20  # bytes of a long document that become tokens at once
_SHORT = 1 << 10  # bytes of documents that are encoded together


def encode_documents(
    tokenizer: Tokenizer, batch: DocumentBatch, *, continues: bool = False
) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield (ids, bytes of text) of documents, each with its end, about 1 MiB at a time.

    Where no id ends a document they are the parts of one text; `continues`: not the first ones.
    """
    for packed in batch.packed():
        if isinstance(tokenizer, ByteTokenizer):
            yield from _encode_bytes(tokenizer, packed)
        else:
            yield _encode_each(tokenizer, packed, continues), len(packed.text)
        continues = tokenizer.eod is None


def _encode_bytes(
    tokenizer: ByteTokenizer, packed: DocumentBatch
) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield the bytes of contiguous documents, with an id after each where one ends documents."""
    if len(packed.lengths) == 1 or tokenizer.eod is None:
        for start in range(0, len(packed.text), _PIECE):
            piece = packed.text[start : start + _PIECE]
            yield piece, len(piece)
        yield _end_of_document(tokenizer), 0
        return
    ends = np.cumsum(packed.lengths + 1) - 1
    tokens = np.empty(len(packed.text) + len(ends), token_dtype(tokenizer.vocab_size))
    is_text = np.ones(len(tokens), bool)
    is_text[ends] = False
    tokens[is_text] = packed.text
    tokens[ends] = tokenizer.eod
    yield tokens, len(packed.text)


def _encode_each(tokenizer: Tokenizer, packed: DocumentBatch, continues: bool) -> NDArray[Any]:
    is_short = tokenizer.eod is not None and int(packed.lengths.max()) <= _SHORT
    if is_short and isinstance(tokenizer, SentencePieceTokenizer):
        return _encode_short(tokenizer, packed)
    end = _end_of_document(tokenizer)
    parts: list[NDArray[Any]] = []
    for text in packed.documents():
        parts += (tokenizer.encode(text, continues=continues), end)
        continues = tokenizer.eod is None
    return np.concatenate(parts)


def _encode_short(tokenizer: SentencePieceTokenizer, packed: DocumentBatch) -> NDArray[Any]:
    """Encode documents that end with an id, which would take a call of sentencepiece each."""
    ids = tokenizer.encode_each([bytes(text) for text in packed.documents()])
    for document in ids:
        document.append(tokenizer.eod)  # type: ignore[arg-type]
    return np.fromiter(chain.from_iterable(ids), token_dtype(tokenizer.vocab_size))


def _end_of_document(tokenizer: Tokenizer) -> NDArray[np.int64]:
    return np.array([] if tokenizer.eod is None else [tokenizer.eod], np.int64)
