"""Facts of runs for cards and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hg_scale.config.schema import Config
from hg_scale.evaluation.report.axes import short_figure
from hg_scale.evaluation.report.baselines import Baseline, corpus_names
from hg_scale.evaluation.report.curves import positions
from hg_scale.evaluation.report.run_folder import Column, RunFolder
from hg_scale.model.costs import parameter_count


@dataclass(frozen=True)
class Card:
    """A run in a few lines; `notes` are what a reader should know before comparing it."""

    name: str
    hierarchy: str
    state: str
    facts: list[tuple[str, str]]
    notes: list[str]


@dataclass(frozen=True)
class ScoreBar:
    """Bits per byte of held-out text; `run` is None for a compressor. `of`: what was scored."""

    label: str
    run: int | None
    value: float
    of: str


def card(run: RunFolder) -> Card:
    """What a run is and where it stands."""
    facts = [("step", f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""))]
    tokens, hours = _last(run.column("tokens")), _last(positions(run)["hours"])
    if tokens is not None:
        facts.append(("tokens", short_figure(tokens)))
    if hours is not None:
        facts.append(("training time", describe_hours(hours)))
    if run.model:
        facts.append(("parameters", short_figure(parameter_count(run.model))))
        facts.append(("training FLOPs", f"{short_figure(run.flops_per_token)} a token"))
    validation = run.validation_column("validation_bits_per_byte")
    best = validation[np.isfinite(validation)]
    if best.size:
        facts.append(("validation", f"{best[-1]:.3f} bits per byte"))
    for key, name, show in (
        ("tokens_per_second", "median throughput", lambda v: f"{short_figure(v)} tokens/s"),
        ("mfu", "median MFU", lambda v: f"{v:.1%}"),
    ):
        values = run.column(key)
        if np.isfinite(values).any():
            facts.append((name, show(float(np.nanmedian(values)))))
    peak = run.column("peak_memory_gib")
    if np.isfinite(peak).any():
        facts.append(("peak memory", f"{float(np.nanmax(peak)):.2f} GiB"))
    return Card(run.name, str(run.setting("model.hierarchy") or ""), run.state, facts, _notes(run))


def _notes(run: RunFolder) -> list[str]:
    notes = []
    if run.model is None:
        notes.append("its model section is of another version: no costs, no drawing")
    if not run.training:
        notes.append("no step was logged")
    if run.training and not run.validation:
        notes.append("no validation" + (" yet" if run.state == "running" else ""))
    if skipped := _last(run.column("skipped_steps")):
        notes.append(f"{skipped:,.0f} bad steps skipped")
    if skipped := _last(run.column("skipped_windows")):
        notes.append(f"{skipped:,.0f} windows of data skipped")
    lost = int((~np.isfinite(run.column("loss"))).sum())
    if lost:
        notes.append(f"the loss of {lost:,} logged steps was not finite")
    lost = int((~np.isfinite(run.validation_column("validation_loss"))).sum())
    if lost:
        notes.append(f"the loss of {lost:,} validations was not finite")
    for before, after in run.layout_changes:
        notes.append(
            f"layout changed after step {before.step:,}: {before.layout_line} → {after.layout_line}"
        )
    damaged = [checkpoint for checkpoint in run.checkpoints if checkpoint.fault]
    if damaged:
        names = ", ".join(checkpoint.name for checkpoint in damaged)
        notes.append(f"not whole: {names}")
    return notes


def score_bars(
    runs: Sequence[RunFolder], baselines: Sequence[Baseline]
) -> dict[str, list[ScoreBar]]:
    """By text, the last validation of each run and the compressors on it, best first.

    A text is the beginning of a corpus's validation split, as much of it as was scored: runs that
    were scored on more or less of it are not ranked together.
    """
    found: dict[tuple[str, int | None], list[ScoreBar]] = {}
    for number, (run, corpus) in enumerate(zip(runs, corpus_names(runs), strict=True)):
        values = run.validation_column("validation_bits_per_byte")
        known = np.flatnonzero(np.isfinite(values))
        if known.size:
            record, value = run.validation[known[-1]], float(values[known[-1]])
            scored = run.scored_tokens
            over = f", {scored:,} tokens" if scored else ""
            bar = ScoreBar(run.name, number, value, f"step {record['step']:,}{over}")
            found.setdefault((corpus, scored), []).append(bar)
    for one in baselines:
        bar = ScoreBar(one.compressor, None, one.bits_per_byte, f"{one.bytes:,} bytes")
        found[one.corpus, one.tokens].append(bar)
    names = {
        (corpus, scored): f"{corpus or 'unknown'}, {scored:,} tokens" if scored else corpus
        for corpus, scored in found
    }
    return {names[text]: sorted(bars, key=lambda b: b.value) for text, bars in found.items()}


def config_differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of every key that is not the same in all of them.

    The notes are none, nor is a key that an older version lacks and that has its default elsewhere.
    """
    flat = [flatten({k: v for k, v in run.tree.items() if k != "notes"}) for run in runs]
    defaults = flatten(Config.model_validate({}).model_dump(mode="json"))
    rows = []
    for key in dict.fromkeys(key for tree in flat for key in tree):
        known = {tree[key] for tree in flat if key in tree}
        if len(known) > 1 or (
            any(key not in tree for tree in flat) and known != {defaults.get(key)}
        ):
            rows.append((key, [tree.get(key, "–") for tree in flat]))
    return rows


def flatten(tree: dict[str, Any], before: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON; text stands without quotes."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{before}{key}.")
        else:
            flat[before + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def describe_hours(hours: float) -> str:
    """A time as a person says it: 48 s, 12 min, 3 h 05 min, 2 d 4 h."""
    seconds = round(hours * 3600)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    whole = round(minutes / 60)
    return f"{whole // 24} d {whole % 24} h"


def _last(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else None
