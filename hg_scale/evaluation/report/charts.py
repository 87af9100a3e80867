"""Curves of several runs as plain geometry, in fractions of the plot; the template draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hg_scale.evaluation.report.axes import tick_labels, ticks
from hg_scale.evaluation.report.baselines import Baseline
from hg_scale.evaluation.report.curves import (
    AXES,
    Axis,
    extremes,
    means,
    positions,
    smooth,
    validation_positions,
)
from hg_scale.evaluation.report.run_folder import Column, RunFolder
from hg_scale.evaluation.report.subjects import BITS, LOSS, REST, ChartSubject

UNITS = 1000  # a path's coordinates are whole numbers, 0 to UNITS from left to right and top down
_BEYOND = 3 * UNITS  # where a curve leaves the plot it is cut off here
_LABEL = 0.055  # of the plot's height: the least distance between labels of baselines


@dataclass(frozen=True)
class Curve:
    """A path of the run with the number `run`; `role`: line, faint, dashed or validation."""

    run: int
    role: str
    path: str


@dataclass(frozen=True)
class Dot:
    """A validation, in percent of the plot from the left and the top."""

    run: int
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Rule:
    """A baseline: `y` of the line and `label_y` of its text, in percent from the top."""

    y: float
    label_y: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A moment of a run, in percent from the left."""

    run: int
    x: float
    title: str


@dataclass(frozen=True)
class Plot:
    """A chart over one axis; ticks are (percent, label), `high` is the x of the right edge.

    `scale`: what x is multiplied with to be shown in the unit of `label`.
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
    """A subject over every axis that there is."""

    subject: ChartSubject
    plots: list[Plot]
    wide: bool = False

    @property
    def about(self) -> str:
        """How to read it, of what is in it."""
        dashed = any(curve.role == "dashed" for curve in self.plots[0].curves)
        return f"{self.subject.about} {self.subject.about_dashed if dashed else ''}".strip()


def make_charts(runs: Sequence[RunFolder], baselines: Sequence[Baseline]) -> list[Chart]:
    """The charts of all subjects that any run has figures of, the loss first."""
    first = [BITS, LOSS] if _needs_loss(runs) else [BITS]
    charts = [
        Chart(s, _plots(s, runs, baselines if s is BITS else ()), wide=i == 0)
        for i, s in enumerate([*first, *REST])
    ]
    return [chart for chart in charts if chart.plots]


def _needs_loss(runs: Sequence[RunFolder]) -> bool:
    """Whether nats a token say more than bits a byte: not where each token is a byte."""
    for run in runs:
        ratios = run.column("bits_per_byte") / run.column("loss") * np.log(2)
        known = ratios[np.isfinite(ratios)]
        if len(run.training) and (not known.size or np.abs(known - 1).max() > 0.01):
            return True
    return False


@dataclass(frozen=True)
class _Figures:
    """One run's part of a chart: x by axis of the logged steps and of validations, and values."""

    run: RunFolder
    number: int
    x: dict[str, Column]
    y: Column
    dashed: Column
    validation_x: dict[str, Column]
    validation: Column

    @property
    def even(self) -> Column:
        """The moving average, over a twentieth of the points."""
        return smooth(self.y, len(self.y) // 20)

    @property
    def begun(self) -> int:
        """How many points are the steep beginning."""
        return len(self.y) // 20 if len(self.y) >= 20 else 0

    @property
    def has_dashed(self) -> bool:
        """Whether the second figure is there and not 0 all the time."""
        return bool(np.nanmax(self.dashed[self.begun :], initial=0) > 0)


def _plots(
    subject: ChartSubject, runs: Sequence[RunFolder], baselines: Sequence[Baseline]
) -> list[Plot]:
    figures = []
    for number, run in enumerate(runs):
        y, dashed = run.column(subject.key), run.column(subject.dashed or "")
        validation = run.validation_column(subject.validation or "")
        if np.isfinite(y).any() or np.isfinite(validation).any():
            figures.append(_Figures(
                run, number, positions(run), y * subject.factor, dashed * subject.factor,
                validation_positions(run), validation * subject.factor,
            ))  # fmt: skip
    if not figures:
        return []
    low, high = _range(subject, figures, baselines)
    plots = (_plot(axis, subject, figures, baselines, low, high) for axis in AXES)
    return [plot for plot in plots if plot]


def _range(
    subject: ChartSubject, figures: Sequence[_Figures], baselines: Sequence[Baseline]
) -> tuple[float, float]:
    """From what to what the y axis goes: the steep beginning may leave it, nothing later does."""
    values: list[float] = [baseline.bits_per_byte for baseline in baselines]
    for one in figures:
        even = one.even if subject.noisy else one.y
        values += [*even[one.begun :], *one.validation]
        if one.has_dashed:
            values += [*one.dashed[one.begun :]]
    known = [value for value in values if np.isfinite(value)]
    low = 0.0 if subject.from_zero else min(known, default=0.0)
    high = max(known, default=1.0)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if subject.from_zero else low - margin), high + margin


def _plot(
    axis: Axis,
    subject: ChartSubject,
    figures: Sequence[_Figures],
    baselines: Sequence[Baseline],
    low: float,
    high: float,
) -> Plot | None:
    ends = [
        float(np.nanmax(x))
        for one in figures
        for x in (one.x[axis.key], one.validation_x[axis.key])
        if np.isfinite(x).any()
    ]
    if not ends or max(ends) <= 0:
        return None
    right = max(ends)
    scale, label = axis.shown(right)

    def across(x: Column) -> Column:
        return x / right

    def down(y: Column) -> Column:
        return (high - y) / (high - low)

    curves: list[Curve] = []
    dots: list[Dot] = []
    marks: list[Mark] = []
    for one in figures:
        x = across(one.x[axis.key])
        if subject.noisy:
            fx, fy = extremes(x, one.y)
            curves.append(Curve(one.number, "faint", path(fx, down(fy))))
        if one.has_dashed:
            dx, dy = means(x, one.dashed)
            curves.append(Curve(one.number, "dashed", path(dx, down(dy))))
        lx, ly = means(x, one.even if subject.noisy else one.y)
        curves.append(Curve(one.number, "line", path(lx, down(ly))))
        vx, vy = across(one.validation_x[axis.key]), down(one.validation)
        if np.isfinite(one.validation).sum() > 1:
            curves.append(Curve(one.number, "validation", path(vx, vy)))
        for x0, y0, value, step in zip(
            vx, vy, one.validation, one.validation_x["steps"], strict=True
        ):
            if np.isfinite([x0, y0]).all():
                said = f"{one.run.name}, validation at step {step:,.0f}: {value:.3f}"
                dots.append(Dot(one.number, round(100 * x0, 2), round(100 * y0, 2), said))
        marks += _marks(one, axis, right)
    x_values, y_values = ticks(0, right * scale, 7), ticks(low, high, 5)
    return Plot(
        axis=axis,
        label=label,
        high=right,
        scale=scale,
        x_ticks=_placed(x_values, lambda v: 100 * v / (right * scale)),
        y_ticks=_placed(y_values, lambda v: 100 * (high - v) / (high - low)),
        curves=[curve for curve in curves if curve.path],
        dots=dots,
        rules=_rules(baselines, low, high),
        marks=marks,
        summary=_summary(subject, figures),
    )


def _placed(values: list[float], place: Callable[[float], float]) -> list[tuple[float, str]]:
    return [
        (round(place(v), 3), label) for v, label in zip(values, tick_labels(values), strict=True)
    ]


def _marks(one: _Figures, axis: Axis, right: float) -> list[Mark]:
    """Where the run went on in another layout."""
    found = []
    steps, x = one.x["steps"], one.x[axis.key]
    known = np.isfinite(x)
    for before, after in one.run.layout_changes:
        if known.any():
            place = float(np.interp(before.step, steps[known], x[known]))
            said = f"{one.run.name} went on from step {before.step:,} as {after.layout_line}"
            found.append(Mark(one.number, round(100 * place / right, 2), said))
    return found


def _rules(baselines: Sequence[Baseline], low: float, high: float) -> list[Rule]:
    """The lines of the compressors, their labels pushed apart."""
    rules: list[Rule] = []
    above = -1.0
    for baseline in sorted(baselines, key=lambda b: -b.bits_per_byte):
        y = (high - baseline.bits_per_byte) / (high - low)
        above = max(y, above + _LABEL)
        label = f"{baseline.label} {baseline.bits_per_byte:.3f}"
        rules.append(Rule(round(100 * y, 2), round(100 * above, 2), label))
    return rules


def _summary(subject: ChartSubject, figures: Sequence[_Figures]) -> str:
    """The chart in a sentence, for those who do not see it."""
    said = []
    for one in figures:
        validation = one.validation[np.isfinite(one.validation)]
        values = one.even[np.isfinite(one.even)]
        if validation.size:
            said.append(f"{one.run.name} ends at {validation[-1]:.4g} in validation")
        elif values.size:
            said.append(f"{one.run.name} ends at {values[-1]:.4g}")
    unit = f" in {subject.unit}" if subject.unit else ""
    return f"{subject.title}{unit}: {'; '.join(said)}."


def path(x: Column, y: Column) -> str:
    """SVG path data through points in fractions of the plot, broken where a value is missing."""
    known = np.isfinite(x) & np.isfinite(y)
    across = np.where(known, np.rint(x * UNITS), 0).astype(int)
    down = np.where(known, np.clip(np.rint(y * UNITS), -_BEYOND, _BEYOND), 0).astype(int)
    data, pen = [], False
    for i, there in enumerate(known):
        if not there:
            pen = False
        elif pen:
            data.append(f"l{across[i] - across[i - 1]} {down[i] - down[i - 1]}")
        else:
            # A stretch of one point is a dot: a line of no length with round ends.
            data.append(f"M{across[i]} {down[i]}h0")
            pen = True
    return "".join(data)
