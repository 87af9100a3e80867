"""Round numbers for axes, and short ones for people."""

from __future__ import annotations

from math import ceil, floor, isfinite, log10

_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within the range."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Labels of ticks: all with the same unit and as many digits as tell them apart."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return ["0" for _ in values]
    apart = min((b - a for a, b in zip(values, values[1:], strict=False)), default=largest)
    if largest < 1e-2:
        return [_scientific(value, largest, apart) for value in values]
    unit = 0
    while largest >= 1000 * 1000**unit and unit < len(_UNITS) - 1:
        unit += 1
    scaled = apart / 1000**unit
    digits = max(0, -floor(log10(scaled) + 1e-9))
    return ["0" if v == 0 else f"{v / 1000**unit:.{digits}f}{_UNITS[unit]}" for v in values]


def _scientific(value: float, largest: float, apart: float) -> str:
    if value == 0:
        return "0"
    power = floor(log10(largest) + 1e-9)
    digits = max(0, power - floor(log10(apart) + 1e-9))
    return f"{value / 10.0**power:.{digits}f}e{power}"


def short_figure(number: float | None) -> str:
    """Three digits and a unit: 812, 31.2k, 4.05M; a dash for what is not there."""
    if number is None or not isfinite(number):
        return "–"
    for unit in _UNITS:
        if abs(number) < 999.5 or unit == _UNITS[-1]:
            return f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("the last unit returns")


def size(count: float) -> str:
    """Bytes in decimal units, as 50.5 MB."""
    number = short_figure(count)
    return f"{number[:-1]} {number[-1]}B" if number[-1].isalpha() else f"{number} B"
