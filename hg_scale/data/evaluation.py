"""Evaluation: every token of a split once, in order, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.data.index import Index
from hg_scale.data.protocol import WindowProtocol, batches
from hg_scale.data.shards import RetryPolicy, SplitReader


def evaluation_windows(
    index: Index,
    split: str,
    *,
    sequence_length: int,
    rows: int,
    data_rank: int = 0,
    data_size: int = 1,
    limit_windows: int | None = None,
    patience: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(inputs, labels), int64 (rows, L) each: the tokens of a split as labels, each once.

    An input is the token before its label, also at the start of a window; the first of the split
    is the end-of-document id, or 0 where there is none; where a window is a document (images), the
    first of every window is. Labels past the end are IGNORED_LABEL. Each rank has consecutive
    windows, and all ranks have the same number of batches, so that collectives match.
    `limit_windows` takes the first windows of the split only.
    Raises DataError where the split is empty or a shard cannot be read.
    """
    reader = SplitReader(index, split, patience)
    how, tokens = WindowProtocol(sequence_length, sequence_length), index.split(split).tokens
    if limit_windows is not None:
        tokens = min(tokens, limit_windows * sequence_length)
    windows = how.count(tokens)
    share = -(-windows // (rows * data_size)) * rows  # windows of a rank
    found = batches(
        reader,
        tokens,
        how,
        rows=rows,
        begin=index.eod or 0,
        separate=index.document_tokens == sequence_length,
        first=min(data_rank * share, windows),
        last=min((data_rank + 1) * share, windows),
    )
    for _ in range(share // rows):
        inputs = np.zeros((rows, sequence_length), np.int64)
        labels = np.full((rows, sequence_length), IGNORED_LABEL, np.int64)
        for part in islice(found, 1):  # none where the text has ended before this rank's share
            filled = np.s_[: part[0].shape[0], : part[0].shape[1]]
            inputs[filled], labels[filled] = part
        yield inputs, labels


def split_text(index: Index, split: str, limit: int | None = None) -> bytes:
    """The text of a split, or of its first `limit` tokens: what a compressor is compared on.

    It is the source text where the tokenizer round-trips.
    """
    whole = index.split(split).tokens
    tokens = SplitReader(index, split).read(0, whole if limit is None else min(whole, limit))
    return index.open_tokenizer().decode(tokens)


def split_bytes(index: Index, split: str) -> int:
    """The length of `split_text`, from the index alone: the denominator of bits per byte."""
    return index.split(split).text_bytes
