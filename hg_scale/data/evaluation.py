"""Batches of a validation or test split: every token once, in order, for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.data.index import Index
from hg_scale.data.protocol import SlidingWindows, window_batches
from hg_scale.data.shards import RetryPolicy, SplitReader


def evaluation_batches(
    index: Index,
    split: str,
    *,
    sequence_length: int,
    batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    max_sequences: int | None = None,
    retry_policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (inputs, labels), int64 (batch_size, L) each; every token of a split is a label once.

    An input is the token before its label, also at the start of a sequence. Before the first token
    of the split it is the end-of-document id, or 0 without one; where each sequence is a document
    (images), before the first token of every sequence. Labels past the end are IGNORED_LABEL. Each
    rank reads consecutive sequences, and all ranks have the same number of batches, so that
    collectives match. `max_sequences`: read only the first ones of the split.
    Raises DataError where the split is empty or a shard cannot be read.
    """
    reader = SplitReader(index, split, retry_policy)
    chunks, tokens = SlidingWindows(sequence_length, sequence_length), index.split(split).tokens
    if max_sequences is not None:
        tokens = min(tokens, max_sequences * sequence_length)
    sequences = chunks.count(tokens)
    per_rank = -(-sequences // (batch_size * data_size)) * batch_size
    batches = window_batches(
        reader,
        tokens,
        chunks,
        batch_size=batch_size,
        start_token=index.eod or 0,
        separate=index.document_tokens == sequence_length,
        first=min(data_rank * per_rank, sequences),
        last=min((data_rank + 1) * per_rank, sequences),
    )
    for _ in range(per_rank // batch_size):
        inputs = np.zeros((batch_size, sequence_length), np.int64)
        labels = np.full((batch_size, sequence_length), IGNORED_LABEL, np.int64)
        for batch in islice(batches, 1):  # none where the text ends before this rank's part
            filled = np.s_[: batch[0].shape[0], : batch[0].shape[1]]
            inputs[filled], labels[filled] = batch
        yield inputs, labels


def split_text(index: Index, split: str, limit: int | None = None) -> bytes:
    """Return the decoded text of a split, or of its first `limit` tokens.

    It equals the source text where the tokenizer round-trips.
    """
    total = index.split(split).tokens
    tokens = SplitReader(index, split).read(0, total if limit is None else min(total, limit))
    return index.open_tokenizer().decode(tokens)


def split_bytes(index: Index, split: str) -> int:
    """Return the length of `split_text` from the index alone: the denominator of bits per byte."""
    return index.split(split).text_bytes
