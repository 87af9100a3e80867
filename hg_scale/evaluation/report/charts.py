"""Curves of several runs as geometry, in fractions of the plot; plot.svg draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hg_scale.evaluation.report.axes import tick_labels, ticks
from hg_scale.evaluation.report.baselines import Baseline
from hg_scale.evaluation.report.chart_specs import BITS, LOSS, OTHER_SPECS, ChartSpec
from hg_scale.evaluation.report.curves import (
    AXES,
    Axis,
    extreme_indices,
    extremes,
    means,
    smooth,
    validation_x_values,
    x_values,
)
from hg_scale.evaluation.report.run_folder import Column, RunFolder

UNITS = 1000  # path coordinates are integers, from 0 to UNITS left to right and top to bottom
_BEYOND = 3 * UNITS  # curves that leave the plot are clipped at this distance
_LABEL = 0.055  # minimum distance of baseline labels, as a fraction of the plot's height


@dataclass(frozen=True)
class Curve:
    """An SVG path of run number `run`; `role`: line, faint, dashed or validation."""

    run: int
    role: str
    path: str


@dataclass(frozen=True)
class Dot:
    """A validation, at (x, y) in percent from the left and the top."""

    run: int
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Rule:
    """A baseline: `y` of the line and `label_y` of its label, in percent from the top."""

    y: float
    label_y: float
    label: str


@dataclass(frozen=True)
class Mark:
    """An event of a run, at `x` percent from the left."""

    run: int
    x: float
    title: str


@dataclass(frozen=True)
class Plot:
    """A chart over one x axis; ticks are (percent, label), `high` is x at the right edge.

    `scale`: factor from x to the unit that `label` names.
    """

    axis: Axis
    label: str
    high: float
    scale: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]
    dots: list[Dot]
    rules: list[Rule]
    marks: list[Mark]
    summary: str


@dataclass(frozen=True)
class Chart:
    """A metric, plotted over every available x axis."""

    spec: ChartSpec
    plots: list[Plot]
    wide: bool = False

    @property
    def about(self) -> str:
        """The caption; mentions the dashed line only where there is one."""
        dashed = any(curve.role == "dashed" for curve in self.plots[0].curves)
        return f"{self.spec.about} {self.spec.about_dashed if dashed else ''}".strip()


def make_charts(runs: Sequence[RunFolder], baselines: Sequence[Baseline]) -> list[Chart]:
    """Return the charts of all metrics that any run has logged, bits per byte first."""
    first = [BITS, LOSS] if _needs_loss(runs) else [BITS]
    charts = [
        Chart(s, _plots(s, runs, baselines if s is BITS else ()), wide=i == 0)
        for i, s in enumerate([*first, *OTHER_SPECS])
    ]
    return [chart for chart in charts if chart.plots]


def _needs_loss(runs: Sequence[RunFolder]) -> bool:
    """Whether nats per token differ from bits per byte: not where every token is a byte."""
    for run in runs:
        ratios = run.column("bits_per_byte") / run.column("loss") * np.log(2)
        finite = ratios[np.isfinite(ratios)]
        if run.logged and (not finite.size or np.abs(finite - 1).max() > 0.01):
            return True
    return False


@dataclass(frozen=True)
class _Series:
    """One run's data of a chart: values at the logged steps and validations, x by axis key."""

    run: RunFolder
    number: int
    x: dict[str, Column]
    y: Column
    dashed: Column
    validation_x: dict[str, Column]
    validation: Column

    @cached_property
    def smoothed(self) -> Column:
        """The moving average over a twentieth of the points."""
        return smooth(self.y, len(self.y) // 20)

    @property
    def warmup(self) -> int:
        """Number of points that count as the steep start, ignored for the y range."""
        return len(self.y) // 20 if len(self.y) >= 20 else 0

    @property
    def has_dashed(self) -> bool:
        """Whether the second metric was logged and is not always 0."""
        return bool(np.nanmax(self.dashed[self.warmup :], initial=0) > 0)


@dataclass(frozen=True)
class _Frame:
    """The data range of a plot: x from 0 to `right`, y from `low` to `high`."""

    right: float
    low: float
    high: float

    def across(self, x: Column) -> Column:
        """Fractions of the width, from the left."""
        return x / self.right

    def down(self, y: Column) -> Column:
        """Fractions of the height, from the top."""
        return (self.high - y) / (self.high - self.low)


def _plots(spec: ChartSpec, runs: Sequence[RunFolder], baselines: Sequence[Baseline]) -> list[Plot]:
    series = []
    for number, run in enumerate(runs):
        y, dashed = run.column(spec.key), run.column(spec.dashed or "")
        validation = run.validation_column(spec.validation or "")
        if np.isfinite(y).any() or np.isfinite(validation).any():
            series.append(_Series(
                run, number, x_values(run), y * spec.factor, dashed * spec.factor,
                validation_x_values(run), validation * spec.factor,
            ))  # fmt: skip
    if not series:
        return []
    low, high = _y_range(spec, series, baselines)
    plots = (_plot(axis, spec, series, baselines, low, high) for axis in AXES)
    return [plot for plot in plots if plot]


def _y_range(
    spec: ChartSpec, series: Sequence[_Series], baselines: Sequence[Baseline]
) -> tuple[float, float]:
    """The range of the y axis: holds everything but the steep start of training."""
    parts = [np.array([baseline.bits_per_byte for baseline in baselines])]
    for one in series:
        y = one.smoothed if spec.noisy else one.y
        parts += [y[one.warmup :], one.validation]
        if one.has_dashed:
            parts.append(one.dashed[one.warmup :])
    values = np.concatenate(parts)
    finite = values[np.isfinite(values)]
    low = 0.0 if spec.from_zero or not finite.size else float(finite.min())
    high = float(finite.max()) if finite.size else 1.0
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if spec.from_zero else low - margin), high + margin


def _plot(
    axis: Axis,
    spec: ChartSpec,
    series: Sequence[_Series],
    baselines: Sequence[Baseline],
    low: float,
    high: float,
) -> Plot | None:
    """The chart over one axis; None where no run has values on it."""
    ends = [
        float(np.nanmax(x))
        for one in series
        for x in (one.x[axis.key], one.validation_x[axis.key])
        if np.isfinite(x).any()
    ]
    if not ends or max(ends) <= 0:
        return None
    frame = _Frame(max(ends), low, high)
    scale, label = axis.unit_for(frame.right)
    right = frame.right * scale
    curves = [curve for one in series for curve in _curves(one, axis, spec, frame)]
    return Plot(
        axis=axis,
        label=label,
        high=frame.right,
        scale=scale,
        x_ticks=_place_ticks(ticks(0, right, 7), lambda v: 100 * v / right),
        y_ticks=_place_ticks(ticks(low, high, 5), lambda v: 100 * (high - v) / (high - low)),
        curves=[curve for curve in curves if curve.path],
        dots=[dot for one in series for dot in _dots(one, axis, frame)],
        rules=_rules(baselines, low, high),
        marks=[mark for one in series for mark in _marks(one, axis, frame.right)],
        summary=_summary(spec, series),
    )


def _curves(one: _Series, axis: Axis, spec: ChartSpec, frame: _Frame) -> list[Curve]:
    """The curves of one run, in drawing order."""
    curves: list[Curve] = []

    def add(role: str, x: Column, y: Column) -> None:
        curves.append(Curve(one.number, role, path(x, frame.down(y))))

    x = frame.across(one.x[axis.key])
    if spec.noisy:
        add("faint", *extremes(x, one.y))
    if one.has_dashed:
        add("dashed", *means(x, one.dashed))
    add("line", *means(x, one.smoothed if spec.noisy else one.y))
    if np.isfinite(one.validation).sum() > 1:
        add("validation", *extremes(frame.across(one.validation_x[axis.key]), one.validation))
    return curves


def _dots(one: _Series, axis: Axis, frame: _Frame) -> list[Dot]:
    """A dot for every validation with a finite value; of many, the extremes."""
    dots = []
    chosen = extreme_indices(one.validation)
    x = frame.across(one.validation_x[axis.key][chosen])
    values, steps = one.validation[chosen], one.validation_x["steps"][chosen]
    for x0, y0, value, step in zip(x, frame.down(values), values, steps, strict=True):
        if np.isfinite([x0, y0]).all():
            title = f"{one.run.name}, validation at step {step:,.0f}: {value:.3f}"
            dots.append(Dot(one.number, round(100 * x0, 2), round(100 * y0, 2), title))
    return dots


def _place_ticks(values: list[float], percent: Callable[[float], float]) -> list[tuple[float, str]]:
    return [
        (round(percent(v), 3), label) for v, label in zip(values, tick_labels(values), strict=True)
    ]


def _marks(one: _Series, axis: Axis, right: float) -> list[Mark]:
    """A mark wherever the run was resumed in another layout."""
    marks = []
    steps, x = one.x["steps"], one.x[axis.key]
    known = np.isfinite(x)
    for before, after in one.run.layout_changes:
        if known.any():
            position = float(np.interp(before.step, steps[known], x[known]))
            title = f"{one.run.name} resumed from step {before.step:,} as {after.layout_line}"
            marks.append(Mark(one.number, round(100 * position / right, 2), title))
    return marks


def _rules(baselines: Sequence[Baseline], low: float, high: float) -> list[Rule]:
    """The lines of the compressors, with labels spread so that they do not overlap."""
    rules: list[Rule] = []
    above = -1.0
    for baseline in sorted(baselines, key=lambda b: -b.bits_per_byte):
        y = (high - baseline.bits_per_byte) / (high - low)
        above = max(y, above + _LABEL)
        label = f"{baseline.label} {baseline.bits_per_byte:.3f}"
        rules.append(Rule(round(100 * y, 2), round(100 * above, 2), label))
    return rules


def _summary(spec: ChartSpec, series: Sequence[_Series]) -> str:
    """The chart in a sentence, for screen readers."""
    parts = []
    for one in series:
        validation = one.validation[np.isfinite(one.validation)]
        values = one.smoothed[np.isfinite(one.smoothed)]
        if validation.size:
            parts.append(f"{one.run.name} ends at {validation[-1]:.4g} in validation")
        elif values.size:
            parts.append(f"{one.run.name} ends at {values[-1]:.4g}")
    unit = f" in {spec.unit}" if spec.unit else ""
    return f"{spec.title}{unit}: {'; '.join(parts)}."


def path(x: Column, y: Column) -> str:
    """Return SVG path data through points in fractions of the plot, with gaps at missing values."""
    known = np.isfinite(x) & np.isfinite(y)
    across = np.where(known, np.rint(x * UNITS), 0).astype(int)
    down = np.where(known, np.clip(np.rint(y * UNITS), -_BEYOND, _BEYOND), 0).astype(int)
    data, pen_down = [], False
    for i, is_known in enumerate(known):
        if not is_known:
            pen_down = False
        elif pen_down:
            data.append(f"l{across[i] - across[i - 1]} {down[i] - down[i - 1]}")
        else:
            # A single point is drawn as a line of length 0, a dot with round line caps.
            data.append(f"M{across[i]} {down[i]}h0")
            pen_down = True
    return "".join(data)
