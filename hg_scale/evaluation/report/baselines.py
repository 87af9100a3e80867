"""General-purpose compressors on the held-out text of runs, for comparison in bits per byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hg_scale.data.evaluation import split_text
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import read_corpus_index
from hg_scale.evaluation.report.run_folder import RunFolder

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}
MAX_TOKENS = 32 * 2**20  # longer texts are not compressed; xz needs half a minute for this many


@dataclass(frozen=True)
class Baseline:
    """A compressor's result on the first `tokens` of a validation split, `bytes` bytes long."""

    compressor: str
    corpus: str
    bits_per_byte: float
    tokens: int
    bytes: int
    label: str


def corpus_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name for the corpus of each run, unique per corpus; "" where a run names none."""
    labels = {run.corpora: " + ".join(source.label for source in run.corpora) for run in runs}
    shared = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return [
        " + ".join(source.path for source in run.corpora)
        if labels[run.corpora] in shared
        else labels[run.corpora]
        for run in runs
    ]


def find_baselines(
    runs: Sequence[RunFolder], show_step: Callable[[str], object]
) -> tuple[list[Baseline], list[str]]:
    """Compress each text that a run was last validated on.

    Returns the results, and for each text without one the reason. `show_step` is called with a
    description of the next compression.
    """
    texts: dict[tuple[str, int], RunFolder] = {}
    for name, run in zip(corpus_names(runs), runs, strict=True):
        if name and (scored := run.scored_tokens):
            texts.setdefault((name, scored), run)
    baselines: list[Baseline] = []
    reasons: list[str] = []
    for (name, tokens), run in texts.items():
        try:
            text = _validated_text(run, tokens)
        except UserError as error:
            reasons.append(f"{name}: {error}")
            continue
        for compressor, compress in COMPRESSORS.items():
            show_step(f"{compressor} on {name}")
            bits = 8 * len(compress(text)) / len(text)
            label = compressor if len(texts) == 1 else f"{compressor} ({name}, {tokens:,} tokens)"
            baselines.append(Baseline(compressor, name, bits, tokens, len(text), label))
    return baselines, list(dict.fromkeys(reasons))


def _validated_text(run: RunFolder, tokens: int) -> bytes:
    """Return the text that the run was validated on. Raises UserError where it cannot be read."""
    if len(run.corpora) > 1:
        raise UserError("the validation is a mean over several sources")
    index = read_corpus_index(run.corpora[0].path)
    if tokens > MAX_TOKENS:
        raise UserError(f"{tokens:,} tokens were scored, more than the limit of {MAX_TOKENS:,}")
    if tokens > index.split("validation").tokens:
        raise UserError(f"its validation split is shorter than the {tokens:,} tokens scored")
    return split_text(index, "validation", tokens)
