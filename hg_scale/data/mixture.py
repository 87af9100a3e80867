"""How several sources take turns: exact shares, and any place computable without history.

Source i has its k-th turn, from 0, at the time (k + 1/2) / weight i; turns are served in the order
of their times. So after any number of windows each source has its share, up to fewer windows than
there are sources. A source that retires leaves its share to the others, in proportion to their
weights, from the window after its last one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Phase:
    """The windows between two retirements."""

    first: int  # window
    counts: list[int]  # windows of each source before
    weights: dict[int, int]  # of the sources that take part


class Mixture:
    """Which source the n-th window is from, and which of that source's windows it is.

    `weights` are positive and compared as the decimal numbers that they are written as. `limits`:
    how many windows each source has before it retires; None: without end.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        whole = _whole_numbers(weights)
        self._sources = len(whole)
        self._phases: list[_Phase] = []
        self.windows: int | None = 0  # how many there are; None: without end
        counts = [0] * len(whole)
        while active := {
            i: weight
            for i, (weight, limit) in enumerate(zip(whole, limits, strict=True))
            if limit is None or counts[i] < limit
        }:
            first = sum(counts)
            self._phases.append(_Phase(first, list(counts), active))
            # The last turn in this phase of each source that retires, and the earliest of them.
            turns = {i: limit - counts[i] for i in active if (limit := limits[i]) is not None}
            if not turns:
                self.windows = None
                break
            end = min(turns, key=lambda i: (Fraction(2 * turns[i] - 1, active[i]), i))
            for i, weight in active.items():
                # Turns no later than that one; of equal times the first source's comes first.
                reach = (2 * turns[end] - 1) * weight + active[end] - (i > end)
                counts[i] += reach // (2 * active[end])
            self.windows = sum(counts)

    def counts(self, windows: int) -> list[int]:
        """How many of the first `windows` windows are from each source."""
        phase = self._phase(windows)
        counts = list(phase.counts)
        for i, turns in _shares(phase.weights, windows - phase.first).items():
            counts[i] += turns
        return counts

    def turns(self, first: int, count: int) -> tuple[Ints, Ints]:
        """(source, number among its windows), (count,) each, of the windows first, first + 1...

        Windows past the end are left out.
        """
        if self.windows is not None:
            count = max(0, min(count, self.windows - first))
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            phase = self._phase(first + done)
            ends = (p.first for p in self._phases if p.first > first + done)
            stop = min(count, next(ends, first + count) - first)
            if len(phase.weights) == 1:
                (source,) = phase.weights
                sources[done:stop] = source
                numbers[done:stop] = self.counts(first + done)[source] + np.arange(stop - done)
            else:
                before = _shares(phase.weights, first + done - phase.first)
                merged = _merge(phase.weights, before)
                for place in range(done, stop):
                    source, turn = next(merged)
                    sources[place], numbers[place] = source, phase.counts[source] + turn
            done = stop
        return sources, numbers

    def _phase(self, window: int) -> _Phase:
        here = (phase for phase in reversed(self._phases) if phase.first <= window)
        return next(here, _Phase(0, [0] * self._sources, {}))


def _shares(weights: dict[int, int], windows: int) -> dict[int, int]:
    """How many turns each source has among the first `windows` of a phase.

    All turns up to a time that is surely early enough, then the few that are missing one by one.
    """
    total = sum(weights.values())
    early = 2 * windows - len(weights) - 2
    turns = {i: max(0, (early * w + total) // (2 * total)) for i, w in weights.items()}
    merged = _merge(weights, turns)
    for _ in range(windows - sum(turns.values())):
        source, _ = next(merged)
        turns[source] += 1
    return turns


def _merge(weights: dict[int, int], turns: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(source, its turn) of the windows of a phase that follow `turns` turns of each source."""
    unit = lcm(*weights.values())  # times in units of 1 / (2 unit) are whole numbers
    heap = [((2 * turns[i] + 1) * (unit // w), i, turns[i]) for i, w in weights.items()]
    heapq.heapify(heap)
    while True:
        time, source, turn = heap[0]
        yield source, turn
        heapq.heapreplace(heap, (time + 2 * (unit // weights[source]), source, turn + 1))


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportion."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(part.denominator for part in exact))
    whole = [int(part * unit) for part in exact]
    return [part // gcd(*whole) for part in whole]
