"""A text corpus: documents of files in several formats, or one text split by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.corpus import (
    KEY_BITS,
    DocumentKeys,
    KeyedBatch,
    ReadTask,
    Segment,
    SourceFile,
    check_folders,
    fingerprint,
    make_tasks,
)
from hg_scale.data.preparation.documents import (
    PIECE_BYTES,
    TextFormat,
    read_pieces,
)
from hg_scale.data.preparation.file_format import format_of
from hg_scale.data.preparation.skipping import STOP, SkipLog
from hg_scale.data.preparation.source_summary import SourceSummary, survey_files
from hg_scale.data.preparation.sources import Advance, is_compressed, text_length
from hg_scale.data.tokenizer import Tokenizer


@dataclass
class TextCorpus:
    """Files whose documents are shuffled and split by their content, or by their folder.

    With `sizes` a single plain file is one text without documents instead, split by position.
    """

    inputs: tuple[Path, ...]
    tokenizer: Tokenizer
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    format: TextFormat = TextFormat()
    fractions: tuple[float, ...] | None = None  # None: by folder, or by `sizes`
    sizes: tuple[int, ...] | None = None  # bytes per split
    seed: int = 0

    files: list[SourceFile] = field(default_factory=list, init=False)
    document_tokens: int | None = field(default=None, init=False)
    summary: SourceSummary = field(default_factory=SourceSummary, init=False)  # on rank 0

    def survey(self, log: SkipLog = STOP) -> dict[str, Any]:
        """Return the files. Raises DataError where the input does not suit the options."""
        self._check_options()
        as_they_are, self.summary = self.format.as_they_are, SourceSummary()
        files = survey_files(
            self.inputs, self.include, self.exclude, self.summary, log, as_they_are=as_they_are
        )
        if self.sizes is not None:
            self._check_single(files)
        elif (
            len(files) == 1
            and not self.format.separator
            and (as_they_are or format_of(Path(files[0].path)) == "text")
        ):
            raise DataError(
                f"--input {files[0].path}: a plain text file is one document, so all of it would "
                "be in one split; set --document-separator to what separates documents, or split "
                "it by position with --split in bytes, such as 90000000,5000000,5000000"
            )
        elif self.fractions is None:
            check_folders(files)
        return {"files": files}

    def use_survey(self, survey: dict[str, Any]) -> None:
        """Set the files that rank 0 found."""
        self.files = [SourceFile(*file) for file in survey["files"]]
        self._keys = DocumentKeys(self.fractions, self.seed)

    def source(self) -> dict[str, Any]:
        """Return the entry of the index that describes the source and the options."""
        source: dict[str, Any] = {
            "name": ", ".join(path.resolve().name for path in self.inputs),
            "kind": "text" if self.sizes else "documents",
            **fingerprint(self.files),
            "split": self.sizes or self.fractions or "folders",
        }
        if left_out := self.summary.left_out.by_default():
            source["left out"] = left_out
        if self.sizes is None:
            kinds = {"text"}
            if self.format.as_they_are:
                source["bytes as they are"] = True
            else:
                kinds = {format_of(Path(file.path)) for file in self.files}
            source["seed"] = self.seed
            if kinds - {"text"}:
                source["field"] = self.format.field
            if "text" in kinds and self.format.separator is not None:
                source["separator"] = self.format.separator.decode(errors="backslashreplace")
        return source

    def tasks(self) -> list[ReadTask]:
        """Return all tasks; they do not depend on the number of processes."""
        if self.sizes is not None:
            return make_tasks(
                self.files, lambda file: not is_compressed(Path(file.path)), PIECE_BYTES
            )
        return make_tasks(self.files, lambda file: self.format.can_split(Path(file.path)))

    def documents(
        self, segment: Segment, scratch: Path, advance: Advance, log: SkipLog = STOP
    ) -> Iterator[KeyedBatch]:
        """Yield (keys, batch) of the documents of a segment, without empty ones."""
        file = self.files[segment.file]
        if self.sizes is not None:
            yield from self._pieces(file, segment, advance)
            return
        span = (segment.begin, segment.end)
        texts = self.format.batches(Path(file.path), *span, scratch, advance, log)
        for found, batch in texts:
            filled = batch.lengths > 0
            positions, batch = found[filled], batch.select(filled)
            if len(positions):
                yield self._keys(file, positions, batch), batch

    def remarks(self) -> Iterator[str]:
        """Yield what is read, by format, and what is left out of folders."""
        return self.summary.lines()

    def _pieces(self, file: SourceFile, segment: Segment, advance: Advance) -> Iterator[KeyedBatch]:
        assert self.sizes is not None
        cuts, span = list(accumulate(self.sizes)), (segment.begin, segment.end)
        last_cut = self.tokenizer.last_cut
        for position, text in read_pieces(Path(file.path), *span, cuts, advance, last_cut):
            split = sum(position >= cut for cut in cuts)
            key = split << KEY_BITS | (position << KEY_BITS) // cuts[-1]
            yield np.array([key], np.uint64), DocumentBatch.single(text)

    def _check_options(self) -> None:
        if self.format.as_they_are and self.format.separator is not None:
            raise DataError("--bytes-as-they-are and --document-separator: set only one of them")
        if self.format.as_they_are and self.sizes is not None:
            raise DataError(
                "--bytes-as-they-are makes each file a document; to split one file by position use "
                "data_prep/prepare_bytes.py"
            )

    def _check_single(self, files: list[SourceFile]) -> None:
        assert self.sizes is not None
        path = Path(files[0].path)
        if len(files) > 1 or format_of(path) != "text" or self.format.separator is not None:
            raise DataError(
                "--split in bytes is for a single plain text; for documents set it to fractions "
                "such as 0.9,0.05,0.05"
            )
        length = text_length(path)
        if length != sum(self.sizes):
            raise DataError(
                f"--input {path}: has {length} bytes of text, --split adds up to {sum(self.sizes)}:"
                " correct it"
            )
