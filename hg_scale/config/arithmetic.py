"""Numbers that would do, for the remedies of the checks."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def nearest(numbers: Iterable[int], value: int, count: int) -> list[int]:
    """Those `count` of `numbers` that are nearest to `value`, in ascending order."""
    return sorted(sorted(numbers, key=lambda n: abs(n - value))[:count])


def near_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else f"{above}"
