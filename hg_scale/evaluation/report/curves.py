"""Columns of a run made ready to draw: where each step lies on every axis, smoothed and thinned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hg_scale.evaluation.report.run_folder import Column, RunFolder

POINTS = 120  # of a curve; a longer one is drawn by the extremes and means of its stretches


@dataclass(frozen=True)
class Axis:
    """What may stand on the x axis; `choice` is its name among the others."""

    key: str
    label: str
    choice: str

    def shown(self, high: float) -> tuple[float, str]:
        """What to multiply values up to `high` with, and the axis's label then."""
        if self.key == "hours" and high < 3:
            return 60.0, self.label.replace("hours", "minutes")
        return 1.0, self.label


AXES = (
    Axis("tokens", "tokens trained on", "tokens"),
    Axis("steps", "optimizer steps", "steps"),
    Axis("compute", "training FLOPs", "compute"),
    Axis("hours", "hours in training steps", "time"),
)


def positions(run: RunFolder) -> dict[str, Column]:
    """Where every logged step lies on each axis."""
    steps, tokens = run.column("step"), run.column("tokens")
    return {
        "steps": steps,
        "tokens": tokens,
        "compute": tokens * run.flops_per_token,
        "hours": _hours(steps, run.column("step_seconds")),
    }


def validation_positions(run: RunFolder) -> dict[str, Column]:
    """Where every validation lies on each axis: at its step, by the logged steps around it."""
    at = run.validation_column("step")
    logged = positions(run)
    found = {"steps": at}
    for key, values in logged.items():
        if key == "steps":
            continue
        known = np.isfinite(values)
        if known.any():
            found[key] = np.interp(at, logged["steps"][known], values[known])
        else:
            found[key] = np.full(len(at), np.nan)
    return found


def _hours(steps: Column, step_seconds: Column) -> Column:
    """Time spent in steps; where one does not say, the median of the others stands for it."""
    if not np.isfinite(step_seconds).any():
        return np.full(len(steps), np.nan)
    seconds = np.where(np.isfinite(step_seconds), step_seconds, np.nanmedian(step_seconds))
    every = steps[1] - steps[0] if len(steps) > 1 else 1.0
    before = max(0.0, steps[0] - every)  # a branch does not begin at step 1
    return np.cumsum(np.diff(steps, prepend=before) * seconds) / 3600


def smooth(values: Column, window: int) -> Column:
    """Means over `window` values around each, over fewer near the ends; gaps stay gaps.

    The first values keep to those as near on both sides, so that a steep beginning stays steep.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    here = np.arange(len(values))
    reach = np.minimum(here, window // 2)
    low, high = here - reach, np.minimum(here + reach + 1, len(values))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def stretches(count: int, limit: int = POINTS) -> list[slice]:
    """Consecutive stretches that cover `count` values, at most `limit` of them."""
    edges = np.linspace(0, count, min(count, limit) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False)]


def means(x: Column, y: Column) -> tuple[Column, Column]:
    """A point a stretch: its last x, the mean of its y."""
    parts = stretches(len(x))
    return np.array([x[p][-1] for p in parts]), np.array([_mean(y[p]) for p in parts])


def extremes(x: Column, y: Column) -> tuple[Column, Column]:
    """The least and the largest point of each stretch, in their order: spikes stay to be seen."""
    if len(x) <= 2 * POINTS:
        return x, y
    chosen: list[int] = []
    for part in stretches(len(x)):
        values = y[part]
        if np.isfinite(values).any():
            chosen += sorted({part.start + int(np.nanargmin(values)),
                              part.start + int(np.nanargmax(values))})  # fmt: skip
        if not np.isfinite(values).all():
            chosen.append(part.start + int(np.flatnonzero(~np.isfinite(values))[0]))
    chosen = sorted(set(chosen))
    return x[chosen], y[chosen]


def _mean(values: Column) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
