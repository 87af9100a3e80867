"""One format of numbers and one of durations, in the terminal and in reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hg_scale.formats import format_bytes, format_duration, format_number


def test_numbers_have_three_digits_and_a_unit() -> None:
    numbers = (0, 812, 999.7, 31_249, 4.05e6, 1e30, None, float("nan"))
    assert [format_number(v) for v in numbers] == [
        "0", "812", "1k", "31.2k", "4.05M", "1e+06Y", "–", "–",
    ]  # fmt: skip
    assert (format_bytes(812), format_bytes(50_480_000)) == ("812 B", "50.5 MB")


def test_durations_are_hours_or_days() -> None:
    shown = [format_duration(s) for s in (0, 36.4, 1260, 11_160, 86_399.6, 190_860)]
    assert shown == ["0:00:00", "0:00:36", "0:21:00", "3:06:00", "1d 00:00", "2d 05:01"]


@given(st.integers(0, 10**8))
def test_a_duration_reads_back(seconds: int) -> None:
    days, _, clock = format_duration(seconds).rpartition("d ")
    fields = [int(field) for field in clock.split(":")]
    if days:
        read = 86_400 * int(days) + 3600 * fields[0] + 60 * fields[1]
        assert 0 <= seconds - read < 60
    else:
        assert seconds == 3600 * fields[0] + 60 * fields[1] + fields[2]
