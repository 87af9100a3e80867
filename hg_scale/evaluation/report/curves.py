"""Columns of a run prepared for plotting: x values on every axis, smoothing and thinning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hg_scale.evaluation.report.run_folder import Column, RunFolder

POINTS = 120  # per curve; a longer one is reduced to the extremes or means of its segments


@dataclass(frozen=True)
class Axis:
    """A quantity for the x axis; `choice` is its name in the page's axis selector."""

    key: str
    label: str
    choice: str

    def unit_for(self, high: float) -> tuple[float, str]:
        """Return (factor to the display unit, label) for values up to `high`."""
        if self.key == "hours" and high < 3:
            return 60.0, self.label.replace("hours", "minutes")
        return 1.0, self.label


AXES = (
    Axis("tokens", "tokens trained on", "tokens"),
    Axis("steps", "optimizer steps", "steps"),
    Axis("compute", "training FLOPs", "compute"),
    Axis("hours", "hours in training steps", "time"),
)


def x_values(run: RunFolder) -> dict[str, Column]:
    """Return the x value of every logged step, by axis key."""
    steps, tokens = run.column("step"), run.column("tokens")
    return {
        "steps": steps,
        "tokens": tokens,
        "compute": tokens * run.flops_per_token,
        "hours": _hours(steps, run.column("step_seconds")),
    }


def validation_x_values(run: RunFolder) -> dict[str, Column]:
    """Return the x value of every validation, by axis key, interpolated between logged steps."""
    steps = run.validation_column("step")
    logged = x_values(run)
    result = {"steps": steps}
    for key, values in logged.items():
        if key == "steps":
            continue
        known = np.isfinite(values)
        if known.any():
            result[key] = np.interp(steps, logged["steps"][known], values[known])
        else:
            result[key] = np.full(len(steps), np.nan)
    return result


def _hours(steps: Column, step_seconds: Column) -> Column:
    """Cumulative hours in training steps; a step without a time counts as the median."""
    if not np.isfinite(step_seconds).any():
        return np.full(len(steps), np.nan)
    seconds = np.where(np.isfinite(step_seconds), step_seconds, np.nanmedian(step_seconds))
    every = steps[1] - steps[0] if len(steps) > 1 else 1.0
    before = max(0.0, steps[0] - every)  # a run that branched off another starts later than 1
    return np.cumsum(np.diff(steps, prepend=before) * seconds) / 3600


def smooth(values: Column, window: int) -> Column:
    """Return the moving average over `window` values; missing values stay missing.

    Near the start the window shrinks symmetrically, so that a steep start stays steep.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    positions = np.arange(len(values))
    reach = np.minimum(positions, window // 2)
    low, high = positions - reach, np.minimum(positions + reach + 1, len(values))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def segments(count: int, limit: int = POINTS) -> list[slice]:
    """Split `count` values into at most `limit` consecutive segments."""
    edges = np.linspace(0, count, min(count, limit) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False)]


def means(x: Column, y: Column) -> tuple[Column, Column]:
    """Return one point per segment: its last x and the mean of its y."""
    parts = segments(len(x))
    return np.array([x[p][-1] for p in parts]), np.array([_mean(y[p]) for p in parts])


def extremes(x: Column, y: Column) -> tuple[Column, Column]:
    """Return the minimum and maximum of each segment, in order, so that spikes stay visible."""
    chosen = extreme_indices(y)
    return x[chosen], y[chosen]


def extreme_indices(y: Column) -> list[int]:
    """Return the indices of the minimum, the maximum and the first gap of each segment, in order.

    All indices where the values are few.
    """
    if len(y) <= 2 * POINTS:
        return list(range(len(y)))
    chosen: list[int] = []
    for part in segments(len(y)):
        values = y[part]
        if np.isfinite(values).any():
            chosen += sorted({part.start + int(np.nanargmin(values)),
                              part.start + int(np.nanargmax(values))})  # fmt: skip
        if not np.isfinite(values).all():
            chosen.append(part.start + int(np.flatnonzero(~np.isfinite(values))[0]))
    return sorted(set(chosen))


def _mean(values: Column) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
