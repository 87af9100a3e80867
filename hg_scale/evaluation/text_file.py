"""Read a file to score, with the readers of data preparation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.file_format import inspect_files
from hg_scale.data.preparation.sources import read_blocks
from hg_scale.data.tokenizer import Tokenizer
from hg_scale.errors import UserError


@dataclass(frozen=True)
class TextFile:
    """A file to score: text, or documents in JSON lines, CSV, TSV, Parquet or Arrow.

    `field`: of the text in these. `as_they_are`: the stored bytes are the text.
    """

    path: Path
    field: str = "text"
    as_they_are: bool = False

    def encode(self, tokenizer: Tokenizer) -> tuple[NDArray[np.integer], int]:
        """Return the tokens and the number of bytes of the text. Raises UserError.

        Documents end with the end-of-document id, if the tokenizer has one, as in training.
        """
        if self.as_they_are or inspect_files([self.path])[self.path].format == "text":
            text = b"".join(read_blocks(self.path, as_it_is=self.as_they_are))
            ids, size = tokenizer.encode(text), len(text)
        else:
            ids, size = self._encode_documents(tokenizer)
        if not len(ids):
            raise UserError(f"{self.path}: is empty, or contains no text")
        return ids, size

    def _encode_documents(self, tokenizer: Tokenizer) -> tuple[NDArray[np.integer], int]:
        end = [] if tokenizer.eod is None else [np.array([tokenizer.eod])]
        parts: list[NDArray[np.integer]] = []
        size = 0
        with tempfile.TemporaryDirectory() as scratch:
            for _, text in TextFormat(self.field).documents(
                self.path, 0, self.path.stat().st_size, Path(scratch), lambda count: None
            ):
                if text:
                    parts += [tokenizer.encode(text), *end]
                    size += len(text)
        return np.concatenate(parts) if parts else np.array([], np.int64), size
