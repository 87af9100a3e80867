"""Where the wall clock of a run went: kept steps, validations, lost steps, time between starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hg_scale.evaluation.report.curves import x_values
from hg_scale.evaluation.report.run_folder import RunFolder
from hg_scale.formats import format_duration

SLOW = 1.3  # times the median of its stage: a slow rank, as `watchdog.slow_rank` by default


@dataclass(frozen=True)
class WallClock:
    """Seconds of a run from its first start to its last line.

    kept: in steps that were kept. validating: in validations. between: from the last line of a
    start to the next start. restarts, repeated: starts after the first, and the steps that they
    took again.
    """

    seconds: float
    kept: float
    validating: float
    between: float
    restarts: int
    repeated: int

    @property
    def goodput(self) -> float:
        """The productive share of the wall clock."""
        return min(1.0, self.kept / self.seconds)

    @property
    def lost(self) -> float:
        """Seconds in neither a kept step nor a validation: start-up, saves, lost steps, waiting."""
        return max(0.0, self.seconds - self.kept - self.validating)


def wall_clock(run: RunFolder) -> WallClock | None:
    """Return the wall clock; None without times. An old run has no starts: from its first line."""
    hours = x_values(run)["hours"]
    times = np.concatenate([run.column("time"), run.validation_column("time")])
    if not np.isfinite(times).any() or not np.isfinite(hours).any():
        return None
    starts = run.starts
    begin = starts[0].time if starts else float(np.nanmin(times))
    seconds = float(np.nanmax(times)) - begin
    if seconds <= 0:
        return None
    again = [start for start in starts[1:] if start.last_time is not None]
    return WallClock(
        seconds=seconds,
        kept=3600 * float(hours[np.isfinite(hours)][-1]),
        validating=float(np.nansum(run.validation_column("validation_seconds"))),
        between=sum(max(0.0, start.time - (start.last_time or 0.0)) for start in again),
        restarts=max(0, len(starts) - 1),
        repeated=sum(max(0, (start.last_step or 0) - start.step) for start in again),
    )


def efficiency_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return the facts of a card on wall clock, goodput, restarts and slow ranks."""
    facts = []
    if clock := wall_clock(run):
        facts.append(("wall clock", format_duration(clock.seconds)))
        facts.append(("goodput", f"{clock.goodput:.1%} of it in steps that were kept"))
        facts.append(("lost time", format_duration(clock.lost)))
        if clock.restarts:
            what = f"{clock.repeated:,} steps taken again, {format_duration(clock.between)} between"
            facts.append(("restarts", f"{clock.restarts} ({what})"))
    if slow := slow_ranks_line(run):
        facts.append(("slow ranks", slow))
    return facts


def slow_ranks_line(run: RunFolder) -> str | None:
    """Describe the ranks that were slow in some logged steps, the most frequent three; or None."""
    ranks, ratios = run.column("slowest_rank"), run.column("slowest_ratio")
    slow = np.isfinite(ranks) & (ratios >= SLOW)
    if not slow.any():
        return None
    found, counts = np.unique(ranks[slow].astype(int), return_counts=True)
    described = []
    for i in np.argsort(-counts, kind="stable")[:3]:
        share, most = counts[i] / len(ranks), ratios[slow & (ranks == found[i])].max()
        described.append(f"rank {found[i]} in {share:.0%} of logged steps, up to {most:.2f} ×")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(described) + more
