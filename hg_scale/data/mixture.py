"""How several sources are mixed: exact shares, and any position computed without history.

The k-th sequence of source i, from 0, is due at time (k + 1/2) / weight_i; sequences are served in
the order of these times. So after any number of sequences each source has its share, off by fewer
sequences than there are sources. The share of a source that retires goes to the others, in
proportion to their weights, from the sequence after its last one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from hg_scale.data.order import Int64Array


@dataclass(frozen=True)
class _Phase:
    """The sequences between two retirements."""

    first: int  # sequence
    counts: list[int]  # sequences of each source before it
    weights: dict[int, int]  # of the sources not retired


class Mixture:
    """The source of the n-th sequence, and its number among that source's sequences.

    `weights` are positive and compared as the decimal numbers that they are written as. `limits`:
    the number of sequences after which each source retires; None: never.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        integers = _integer_weights(weights)
        self._sources = len(integers)
        self._phases: list[_Phase] = []
        self.sequences: int | None = 0  # in all; None: without end
        counts = [0] * len(integers)
        while active := {
            i: weight
            for i, (weight, limit) in enumerate(zip(integers, limits, strict=True))
            if limit is None or counts[i] < limit
        }:
            first = sum(counts)
            self._phases.append(_Phase(first, list(counts), active))
            # Sequences left of each source that retires; the earliest to finish ends the phase.
            left = {i: limit - counts[i] for i in active if (limit := limits[i]) is not None}
            if not left:
                self.sequences = None
                break
            end = min(left, key=lambda i: (Fraction(2 * left[i] - 1, active[i]), i))
            for i, weight in active.items():
                # Sequences due no later than that one's last; at equal times lower sources first.
                reach = (2 * left[end] - 1) * weight + active[end] - (i > end)
                counts[i] += reach // (2 * active[end])
            self.sequences = sum(counts)

    def counts(self, sequences: int) -> list[int]:
        """Return how many of the first `sequences` are from each source."""
        phase = self._phase(sequences)
        counts = list(phase.counts)
        for i, count in _counts_in_phase(phase.weights, sequences - phase.first).items():
            counts[i] += count
        return counts

    def locate(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return (source, number in the source) of sequences first to first + count - 1.

        Each is an array (count,), or shorter where the mixture ends before.
        """
        if self.sequences is not None:
            count = max(0, min(count, self.sequences - first))
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
                before = _counts_in_phase(phase.weights, first + done - phase.first)
                merged = _merge(phase.weights, before)
                for i in range(done, stop):
                    source, number = next(merged)
                    sources[i], numbers[i] = source, phase.counts[source] + number
            done = stop
        return sources, numbers

    def _phase(self, sequence: int) -> _Phase:
        started = (phase for phase in reversed(self._phases) if phase.first <= sequence)
        return next(started, _Phase(0, [0] * self._sources, {}))


def _counts_in_phase(weights: dict[int, int], sequences: int) -> dict[int, int]:
    """Return how many of the first `sequences` of a phase are from each source.

    Counts all sequences due before a time that is surely early enough, then adds the few that are
    missing one by one.
    """
    total = sum(weights.values())
    early = 2 * sequences - len(weights) - 2
    counts = {i: max(0, (early * w + total) // (2 * total)) for i, w in weights.items()}
    merged = _merge(weights, counts)
    for _ in range(sequences - sum(counts.values())):
        source, _ = next(merged)
        counts[source] += 1
    return counts


def _merge(weights: dict[int, int], counts: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (source, number) of a phase's sequences after the first `counts` of each source."""
    resolution = lcm(*weights.values())  # times are integers in units of 1 / (2 resolution)
    heap = [((2 * counts[i] + 1) * (resolution // w), i, counts[i]) for i, w in weights.items()]
    heapq.heapify(heap)
    while True:
        time, source, number = heap[0]
        yield source, number
        due = time + 2 * (resolution // weights[source])
        heapq.heapreplace(heap, (due, source, number + 1))


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Return coprime integers in the same proportion."""
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(part.denominator for part in exact))
    integers = [int(part * denominator) for part in exact]
    return [part // gcd(*integers) for part in integers]
