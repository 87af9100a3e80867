"""Valid numbers near an invalid one, which the checks suggest."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt


def divisors(number: int) -> list[int]:
    """Return all divisors, in ascending order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def nearest(numbers: Iterable[int], value: int, count: int) -> list[int]:
    """Return the `count` numbers nearest to `value`, in ascending order."""
    return sorted(sorted(numbers, key=lambda n: abs(n - value))[:count])


def nearest_multiples(value: int, step: int) -> str:
    """Return the multiples of `step` around `value` as text: "6 or 9"."""
    below, above = value // step * step, -(-value // step) * step
    return f"{below} or {above}" if below else f"{above}"
