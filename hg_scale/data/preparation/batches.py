"""Many documents at once: joined text with the bounds of each, so that no document is an object.

What a preparation holds is then bounded by bytes, also where documents have a few bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.skipping import STOP, SkipLog
from hg_scale.data.preparation.sources import Advance, is_compressed, read_blocks

MAX_DOCUMENT_BYTES = 1 << 30  # a document has to fit into memory

_BATCH_BYTES = 1 << 20  # of text that is joined or gathered at once
_BATCH_DOCUMENTS = 1 << 16
_SHORT = 256  # bytes of documents that are faster gathered byte by byte than one by one

_Int64Array = NDArray[np.int64]


class DocumentBatch(NamedTuple):
    """Documents as parts of a text: starts and lengths (n,) in bytes, in the order of the source.

    The text may also contain bytes between the documents.
    """

    text: NDArray[np.uint8]
    starts: _Int64Array
    lengths: _Int64Array

    @classmethod
    def single(cls, content: bytes) -> DocumentBatch:
        """Return a batch of one document."""
        return cls.joined([content])

    @classmethod
    def joined(cls, contents: list[bytes]) -> DocumentBatch:
        """Return a batch of some documents."""
        lengths = np.fromiter(map(len, contents), np.int64, len(contents))
        text = np.frombuffer(contents[0] if len(contents) == 1 else b"".join(contents), np.uint8)
        return cls(text, np.cumsum(lengths) - lengths, lengths)

    def select(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> DocumentBatch:
        """Return some of the documents, by number or by a boolean for each."""
        return DocumentBatch(self.text, self.starts[which], self.lengths[which])

    def documents(self) -> Iterator[memoryview]:
        """Yield each document."""
        view = memoryview(self.text)  # type: ignore[arg-type]
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield view[start : start + length]

    def packed(self) -> Iterator[DocumentBatch]:
        """Yield the documents in batches of about 1 MiB that are copied to be contiguous.

        A document that is longer has a batch of its own, and is not copied.
        """
        ends = np.cumsum(self.lengths)
        bins, numbers = (ends - 1) // _BATCH_BYTES, np.arange(len(ends)) // _BATCH_DOCUMENTS
        long = self.lengths > _BATCH_BYTES
        changes = np.diff(bins) | np.diff(numbers) | long[1:] | long[:-1]
        cuts = (np.flatnonzero(changes) + 1).tolist()
        for first, last in zip([0, *cuts], [*cuts, len(ends)], strict=True):
            if first < last:
                yield self._pack(first, last)

    def _pack(self, first: int, last: int) -> DocumentBatch:
        starts, lengths = self.starts[first:last], self.lengths[first:last]
        targets = np.cumsum(lengths) - lengths
        size = int(lengths.sum())
        if last - first == 1:
            text = self.text[int(starts[0]) : int(starts[0]) + size]
        elif size < (last - first) * _SHORT:
            text = self.text[np.repeat(starts - targets, lengths) + np.arange(size)]
        else:
            parts = DocumentBatch(self.text, starts, lengths).documents()
            text = np.frombuffer(b"".join(parts), np.uint8)
        return DocumentBatch(text, targets, lengths)


PositionedBatch = tuple[_Int64Array, DocumentBatch]  # positions (n,) in the file, the documents


def group_documents(documents: Iterator[tuple[int, bytes]]) -> Iterator[PositionedBatch]:
    """Join (position, text) of single documents to batches of about 1 MiB."""
    positions: list[int] = []
    contents: list[bytes] = []
    held = 0
    for position, text in documents:
        positions.append(position)
        contents.append(text)
        held += len(text)
        if held >= _BATCH_BYTES or len(contents) >= _BATCH_DOCUMENTS:
            yield np.array(positions, np.int64), DocumentBatch.joined(contents)
            positions, contents, held = [], [], 0
    if contents:
        yield np.array(positions, np.int64), DocumentBatch.joined(contents)


def separated_batches(
    path: Path, separator: bytes, begin: int, end: int, advance: Advance, log: SkipLog = STOP
) -> Iterator[PositionedBatch]:
    """Yield the texts between separators that begin in [begin, end), also empty ones.

    Positions count bytes of the decompressed text; a compressed file is read from start to end.
    A part of a file in which no text begins is read up to `end` only, not to the next separator.
    Texts that are too long go to `log`.
    """
    position = max(0, begin - len(separator))  # of the pending text: one after a separator that
    skipping = begin > 0  # ends at `begin` is ours; up to the first separator
    stop = None if is_compressed(path) else end
    pending: list[bytes] = []
    held, tail = 0, b""  # bytes pending; the last bytes, in which a separator may begin
    for block in read_blocks(path, position, advance):
        pending.append(block)
        held += len(block)
        seen = tail + block
        if separator in seen:
            text = b"".join(pending)
            pending.clear()  # which may be as long as a document
            batch = _between(separator, text)
            used = len(batch.text)
            positions, rest = position + batch.starts, text[used:]
            position += used
            ours = np.ones(len(positions), bool) if stop is None else positions < stop
            ours[0] &= not skipping
            del text
            if ours.any():
                yield positions[ours], batch.select(ours)
            skipping, pending, held, seen = False, [rest], len(rest), rest
            if stop is not None and position >= stop:
                return
        tail = seen[max(0, len(seen) - len(separator) + 1) :]
        if held > MAX_DOCUMENT_BYTES and not skipping:
            log.skip(path, "document", position, document_too_long(path, position))
            skipping = True
        if skipping:
            position, pending, held = position + held - len(tail), [tail], len(tail)
            if stop is not None and position + held >= stop:
                return
    if held and not skipping:
        yield np.array([position], np.int64), DocumentBatch.single(b"".join(pending))


def _between(separator: bytes, text: bytes) -> DocumentBatch:
    """Return a batch of the parts of a text in front of each separator; the rest is not in it."""
    lengths = np.array([len(part) for part in text.split(separator)[:-1]], np.int64)
    ends = np.cumsum(lengths + len(separator))
    used = np.frombuffer(text, np.uint8)[: int(ends[-1])]
    return DocumentBatch(used, ends - lengths - len(separator), lengths)


def document_too_long(path: Path, position: int) -> DataError:
    """Return the error for a document that does not fit into memory."""
    return DataError(
        f"{path}: the document at byte {position} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; "
        "set --document-separator to what separates documents, or split a single text by position "
        "with --split in bytes"
    )
