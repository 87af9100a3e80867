"""General-purpose compressors on the held-out text of the runs: what bits per byte mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hg_scale.errors import UserError
from hg_scale.evaluation.report.run_folder import RunFolder
from hg_scale.evaluation.summary import COMPRESSORS, compressed, held_out_text

LIMIT = 32 * 2**20  # tokens of a corpus that are compressed; xz takes half a minute for as many


@dataclass(frozen=True)
class Baseline:
    """A compressor on `bytes` of the validation text of `corpus`."""

    compressor: str
    corpus: str
    bits_per_byte: float
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
    """The compressors on every corpus once, and why some corpus has none.

    `doing` is told what comes next.
    """
    corpora = {name: run.corpora for name, run in zip(corpus_names(runs), runs, strict=True)}
    baselines, reasons = [], []
    for name, sources in corpora.items():
        if not name:
            continue
        try:
            text = held_out_text(sources, LIMIT)
            if not text:
                raise UserError("no validation split")
        except UserError as error:
            reasons.append(f"{name}: {error}")
            continue
        for compressor in COMPRESSORS:
            doing(f"{compressor} on {name}")
            bits = compressed(compressor, text)
            label = compressor if len(corpora) == 1 else f"{compressor} ({name})"
            baselines.append(Baseline(compressor, name, bits, len(text), label))
    return baselines, reasons
