"""What a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from hg_scale.errors import UserError
from hg_scale.evaluation.report.run_folder import RunFolder
from hg_scale.evaluation.summary import TEMPERATURE, sample_text
from hg_scale.evaluation.trained import index_of_run


@dataclass(frozen=True)
class Sample:
    """Text of the newest checkpoint, or why there is none."""

    text: str
    how: str


def sample_of(run: RunFolder, tokens: int, seed: int) -> Sample:
    """`tokens` tokens from the beginning of a document."""
    if not any(checkpoint.fault is None for checkpoint in run.checkpoints):
        return Sample("", "no sample: the run has no whole checkpoint")
    if not run.corpora:
        return Sample("", "no sample: the run names no data, so no tokenizer")
    try:
        if index_of_run(run.corpora[0].path).document_tokens:
            return Sample("", "no sample: the corpus holds images")
        text = sample_text(run.path, tokens, seed)
    except UserError as error:
        return Sample("", f"no sample: {'; '.join(str(error).splitlines())}")
    return Sample(
        readable(text),
        f"{tokens} tokens from an empty beginning, temperature {TEMPERATURE}, seed {seed}",
    )


def readable(text: str) -> str:
    """Control characters as their pictures, so that a page may hold them."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text.replace("\r\n", "\n")
    )
