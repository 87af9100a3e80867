"""The tokenizer of a run, kept in its folder: its checkpoints are of use without the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hg_scale.data.tokenizer import (
    MODEL_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerIdentity,
    load_tokenizer,
)


def keep_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Write it into a run's folder, where it needs a file. Raises OSError."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        (run / MODEL_FILE).write_bytes(tokenizer.model)


def kept_tokenizer(checkpoint: Path, identity: dict[str, Any] | None) -> Tokenizer | None:
    """The one that the manifest of `RUN/checkpoints/step-N` names, where it is at hand.

    Bytes without an end of documents are left out: they may be images, which need their index.
    Raises DataError where the file is of another tokenizer.
    """
    if not identity:
        return None
    known = TokenizerIdentity.model_validate(identity)
    if known.sha256 is None:
        return load_tokenizer(known) if known.eod is not None else None
    file = checkpoint.resolve().parent.parent / MODEL_FILE
    return load_tokenizer(known, file.read_bytes()) if file.is_file() else None
