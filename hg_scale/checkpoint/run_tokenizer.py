"""The tokenizer in a run folder: a run's checkpoints can be used without its corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hg_scale.bounded_read import BINARY_BYTES, format_errors, read_bounded
from hg_scale.data.errors import DataError
from hg_scale.data.tokenizer import (
    MODEL_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerIdentity,
    load_tokenizer,
)


def save_run_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's model file, if it has one, into a run folder. Raises OSError."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        (run / MODEL_FILE).write_bytes(tokenizer.model)


def load_run_tokenizer(checkpoint: Path, identity: dict[str, Any] | None) -> Tokenizer | None:
    """Load the tokenizer with this identity from the run folder of `RUN/checkpoints/step-N`.

    Returns None if it is not available, and for bytes without an end-of-document id: these may be
    images, which need their index. Raises DataError if the file is of another tokenizer.
    """
    if not identity:
        return None
    expected = TokenizerIdentity.model_validate(identity)
    if expected.sha256 is None:
        return load_tokenizer(expected) if expected.eod is not None else None
    file = checkpoint.resolve().parent.parent / MODEL_FILE
    if not file.is_file():
        return None
    with format_errors(file, DataError):
        return load_tokenizer(expected, read_bounded(file, BINARY_BYTES))
