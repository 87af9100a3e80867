"""Round tick values for axes, and their labels."""

from __future__ import annotations

from math import ceil, floor, log10

from hg_scale.formats import SI_PREFIXES


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` ticks within the range, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Return labels of ticks, all with the same unit and enough digits to be distinct."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return ["0" for _ in values]
    spacing = min((b - a for a, b in zip(values, values[1:], strict=False)), default=largest)
    if largest < 1e-2:
        return [_scientific(value, largest, spacing) for value in values]
    unit = 0
    while largest >= 1000 * 1000**unit and unit < len(SI_PREFIXES) - 1:
        unit += 1
    scaled = spacing / 1000**unit
    digits = max(0, -floor(log10(scaled) + 1e-9))
    return ["0" if v == 0 else f"{v / 1000**unit:.{digits}f}{SI_PREFIXES[unit]}" for v in values]


def _scientific(value: float, largest: float, spacing: float) -> str:
    if value == 0:
        return "0"
    power = floor(log10(largest) + 1e-9)
    digits = max(0, power - floor(log10(spacing) + 1e-9))
    return f"{value / 10.0**power:.{digits}f}e{power}"
