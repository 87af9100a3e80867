"""General-purpose compressors on the held-out text of the runs: what bits per byte mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hg_scale.data.evaluation import split_text
from hg_scale.errors import UserError
from hg_scale.evaluation.compressors import COMPRESSORS, compressed
from hg_scale.evaluation.loaded_model import index_of_run
from hg_scale.evaluation.report.run_folder import RunFolder

LIMIT = 32 * 2**20  # tokens that are compressed at most; xz takes half a minute for as many


@dataclass(frozen=True)
class Baseline:
    """A compressor on the first `tokens` of the validation split of `corpus`, `bytes` long."""

    compressor: str
    corpus: str
    bits_per_byte: float
    tokens: int
    bytes: int
    label: str


def corpus_names(runs: Sequence[RunFolder]) -> list[str]:
    """What each run was trained on, by a name that no other corpus has; "" where none is named."""
    labels = {run.corpora: " + ".join(source.label for source in run.corpora) for run in runs}
    shared = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return [
        " + ".join(source.path for source in run.corpora)
        if labels[run.corpora] in shared
        else labels[run.corpora]
        for run in runs
    ]


def find_baselines(
    runs: Sequence[RunFolder], doing: Callable[[str], object]
) -> tuple[list[Baseline], list[str]]:
    """The compressors on each text that a run was scored on last, and why some text has none.

    `doing` is told what comes next.
    """
    texts: dict[tuple[str, int], RunFolder] = {}
    for name, run in zip(corpus_names(runs), runs, strict=True):
        if name and (scored := run.scored_tokens):
            texts.setdefault((name, scored), run)
    baselines: list[Baseline] = []
    reasons: list[str] = []
    for (name, tokens), run in texts.items():
        try:
            text = _text(run, tokens)
        except UserError as error:
            reasons.append(f"{name}: {error}")
            continue
        for compressor in COMPRESSORS:
            doing(f"{compressor} on {name}")
            bits = compressed(compressor, text)
            label = compressor if len(texts) == 1 else f"{compressor} ({name}, {tokens:,} tokens)"
            baselines.append(Baseline(compressor, name, bits, tokens, len(text), label))
    return baselines, list(dict.fromkeys(reasons))


def _text(run: RunFolder, tokens: int) -> bytes:
    """What the run was scored on. Raises UserError where it is not at hand, or is no one text."""
    if len(run.corpora) > 1:
        raise UserError("the figure is a mean over several sources")
    index = index_of_run(run.corpora[0].path)
    if tokens > LIMIT:
        raise UserError(f"{tokens:,} tokens were scored, more than the {LIMIT:,} compressed here")
    if tokens > index.split("validation").tokens:
        raise UserError(f"its validation split is shorter than the {tokens:,} tokens scored")
    return split_text(index, "validation", tokens)
