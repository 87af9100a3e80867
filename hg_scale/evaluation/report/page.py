"""The HTML page: computes what the templates show and renders them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from hg_scale import __version__
from hg_scale.evaluation.report.baselines import Baseline
from hg_scale.evaluation.report.charts import make_charts
from hg_scale.evaluation.report.curves import (
    AXES,
    extreme_indices,
    segments,
    validation_x_values,
    x_values,
)
from hg_scale.evaluation.report.drawing import draw_hierarchy
from hg_scale.evaluation.report.evaluations import read_evaluations
from hg_scale.evaluation.report.run_folder import Column, RunFolder
from hg_scale.evaluation.report.samples import Sample
from hg_scale.evaluation.report.tables import config_differences, score_bars, summary_card
from hg_scale.formats import format_bytes
from hg_scale.model.layer_table import layer_table

_DIGITS = 5  # significant digits of the values behind the curves


@dataclass(frozen=True)
class ReportContents:
    """What a report shows; `samples` has one per run or is empty.

    `reasons`: why the compressors of a text are missing. `refresh`: seconds after which a browser
    loads the page again.
    """

    runs: Sequence[RunFolder]
    baselines: Sequence[Baseline]
    reasons: Sequence[str]
    samples: Sequence[Sample]
    refresh: int | None = None


def render(report: ReportContents) -> str:
    """Return the HTML of a report."""
    environment = Environment(
        loader=PackageLoader("hg_scale.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"bytes": format_bytes}
    bars = score_bars(report.runs, report.baselines)
    runs, charts = report.runs, make_charts(report.runs, report.baselines)
    plotted = {plot.axis.key for chart in charts for plot in chart.plots}
    specs = {chart.spec.key: chart.spec for chart in charts}
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        report=report,
        runs=runs,
        cards=[summary_card(run) for run in runs],
        bars=bars,
        longest=max((bar.value for part in bars.values() for bar in part), default=1.0),
        charts=charts,
        axes=[axis for axis in AXES if axis.key in plotted],
        differences=config_differences(runs) if len(runs) > 1 else [],
        models=_models(runs),
        evaluations=[
            [{"run": run.name, "number": i, "score": one} for one in read_evaluations(run.path)]
            for i, run in enumerate(runs)
        ],
        refresh=report.refresh,
        configs=[json.dumps(run.tree, indent=2) for run in runs],
        figures={
            "names": [run.name for run in runs],
            "specs": {
                key: {"unit": s.unit, "factor": s.factor, "validation": s.validation}
                for key, s in specs.items()
            },
            "runs": [_figures(run, list(specs)) for run in runs],
        },
    )


def _models(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return the drawing and layer table of every distinct model, with the names of its runs."""
    models: list[dict[str, Any]] = []
    for run in runs:
        if run.model is None:
            continue
        drawing, rows = draw_hierarchy(run.model), layer_table(run.model)
        same = next((m for m in models if (m["drawing"], m["rows"]) == (drawing, rows)), None)
        if same:
            same["names"].append(run.name)
            continue
        models.append({
            "names": [run.name], "model": run.model, "drawing": drawing, "rows": rows,
            "max_share": max(row.share for row in rows),
        })  # fmt: skip
    return models


def _figures(run: RunFolder, keys: Sequence[str]) -> dict[str, Any]:
    """Return the values that page.js shows under the pointer, one mean per segment."""
    parts = segments(run.logged)
    scores = {k: run.validation_column(k) for k in ("validation_bits_per_byte", "validation_loss")}
    shown = extreme_indices(scores["validation_bits_per_byte"])
    return {
        "x": {k: [_number(v[p][-1]) for p in parts] for k, v in x_values(run).items()},
        "y": {k: [_mean(run.column(k)[p]) for p in parts] for k in keys},
        "vx": {k: [_number(v) for v in x[shown]] for k, x in validation_x_values(run).items()},
        "vy": {k: [_number(v) for v in y[shown]] for k, y in scores.items()},
    }


def _mean(values: Column) -> float | None:
    return _number(float(np.nanmean(values))) if np.isfinite(values).any() else None


def _number(value: float) -> float | None:
    """Round to a few digits; None where the value is not finite, since JSON has no NaN."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
