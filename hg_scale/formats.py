"""How numbers and durations are shown, in the terminal and in reports."""

from __future__ import annotations

from math import isfinite

SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def format_number(number: float | None) -> str:
    """Format with three digits and a unit: 812, 31.2k, 4.05M; a dash for a missing value."""
    if number is None or not isfinite(number):
        return "–"
    for unit in SI_PREFIXES:
        if abs(number) < 999.5 or unit == SI_PREFIXES[-1]:
            return f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable: the loop returns at the last unit")


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units, as 50.5 MB."""
    number = format_number(count)
    return f"{number[:-1]} {number[-1]}B" if number[-1].isalpha() else f"{number} B"


def format_duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, or with days: 1:02:03, 2d 03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"
