"""Cards and tables of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hg_scale.config.schema import Config
from hg_scale.evaluation.report.baselines import Baseline, corpus_names
from hg_scale.evaluation.report.curves import x_values
from hg_scale.evaluation.report.efficiency import efficiency_facts
from hg_scale.evaluation.report.run_folder import Column, RunFolder
from hg_scale.formats import format_duration, format_number
from hg_scale.model.costs import parameter_count


@dataclass(frozen=True)
class SummaryCard:
    """A run in a few lines; `notes` are what to know before comparing it with others."""

    name: str
    hierarchy: str
    state: str
    facts: list[tuple[str, str]]
    notes: list[str]


@dataclass(frozen=True)
class ScoreBar:
    """Bits per byte of held-out text; `run` is None for a compressor.

    `scored`: what was scored, as text.
    """

    label: str
    run: int | None
    value: float
    scored: str


def summary_card(run: RunFolder) -> SummaryCard:
    """Return the card of a run: model, progress and the main figures."""
    facts = [("step", f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""))]
    tokens, hours = _last(run.column("tokens")), _last(x_values(run)["hours"])
    if tokens is not None:
        facts.append(("tokens", format_number(tokens)))
    if hours is not None:
        facts.append(("training time", format_duration(3600 * hours)))
    facts += efficiency_facts(run)
    if run.model:
        facts.append(("parameters", format_number(parameter_count(run.model))))
        facts.append(("training FLOPs", f"{format_number(run.flops_per_token)} per token"))
    validation = run.validation_column("validation_bits_per_byte")
    best = validation[np.isfinite(validation)]
    if best.size:
        facts.append(("validation", f"{best[-1]:.3f} bits per byte"))
    for key, name, show in (
        ("tokens_per_second", "median throughput", lambda v: f"{format_number(v)} tokens/s"),
        ("mfu", "median MFU", lambda v: f"{v:.1%}"),
    ):
        values = run.column(key)
        if np.isfinite(values).any():
            facts.append((name, show(float(np.nanmedian(values)))))
    peak = run.column("peak_memory_gib")
    if np.isfinite(peak).any():
        facts.append(("peak memory", f"{float(np.nanmax(peak)):.2f} GiB"))
    return SummaryCard(
        run.name, str(run.setting("model.hierarchy") or ""), run.state, facts, _notes(run)
    )


def _notes(run: RunFolder) -> list[str]:
    notes = []
    if run.model is None:
        notes.append("the model section is from another version: no costs, no drawing")
    if not run.logged:
        notes.append("no logged step")
    if run.logged and not len(run.validation_column("step")):
        notes.append("no validation" + (" yet" if run.state == "running" else ""))
    if skipped := _last(run.column("skipped_steps")):
        notes.append(f"{skipped:,.0f} bad steps skipped")
    if skipped := _last(run.column("skipped_windows")):
        notes.append(f"{skipped:,.0f} data sequences skipped")
    if count := int((~np.isfinite(run.column("loss"))).sum()):
        notes.append(f"the loss of {count:,} logged steps was not finite")
    if count := int((~np.isfinite(run.validation_column("validation_loss"))).sum()):
        notes.append(f"the loss of {count:,} validations was not finite")
    for before, after in run.layout_changes:
        notes.append(
            f"layout changed after step {before.step:,}: {before.layout_line} → {after.layout_line}"
        )
    incomplete = [checkpoint for checkpoint in run.checkpoints if checkpoint.problem]
    if incomplete:
        names = ", ".join(checkpoint.name for checkpoint in incomplete)
        notes.append(f"incomplete checkpoints: {names}")
    return notes


def score_bars(
    runs: Sequence[RunFolder], baselines: Sequence[Baseline]
) -> dict[str, list[ScoreBar]]:
    """Return, for each text, the last validation of each run and the compressors, best first.

    A text is the part of a corpus's validation split that was scored, so that runs scored on
    different amounts of it are not ranked together.
    """
    bars: dict[tuple[str, int | None], list[ScoreBar]] = {}
    for number, (run, corpus) in enumerate(zip(runs, corpus_names(runs), strict=True)):
        values = run.validation_column("validation_bits_per_byte")
        known = np.flatnonzero(np.isfinite(values))
        if known.size:
            step, value = run.validation_column("step")[known[-1]], float(values[known[-1]])
            scored = run.scored_tokens
            over = f", {scored:,} tokens" if scored else ""
            bar = ScoreBar(run.name, number, value, f"step {step:,.0f}{over}")
            bars.setdefault((corpus, scored), []).append(bar)
    for one in baselines:
        bar = ScoreBar(one.compressor, None, one.bits_per_byte, f"{one.bytes:,} bytes")
        bars[one.corpus, one.tokens].append(bar)
    names = {
        (corpus, scored): f"{corpus or 'unknown'}, {scored:,} tokens" if scored else corpus
        for corpus, scored in bars
    }
    return {names[text]: sorted(ranked, key=lambda b: b.value) for text, ranked in bars.items()}


def config_differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return (key, value in each run) for every key whose value differs between the runs.

    `notes` is ignored, and so is a key that an older version lacks and that has its default in the
    other runs.
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


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted keys and their values as JSON; strings without quotes."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _last(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else None
