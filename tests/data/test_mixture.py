from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.mixture import Mixture

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)
LIMITS = st.lists(st.none() | st.integers(0, 300), min_size=6, max_size=6)


def test_shares_of_two_sources():
    sources, _ = Mixture([0.7, 0.3], [None, None]).turns(0, 10_000)
    assert (sources == 0).sum() == 7000
    for windows in range(1, 10_001):
        assert abs((sources[:windows] == 0).sum() - Fraction(7, 10) * windows) <= 1


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_every_source_has_its_share_anywhere(weights, windows):
    counts = Mixture(weights, [None] * len(weights)).counts(windows)
    exact = [Fraction(str(weight)) for weight in weights]
    assert sum(counts) == windows
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count - windows * weight / sum(exact)) <= max(1, len(weights) - 1)


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, LIMITS, st.data())
def test_a_jump_lands_where_counting_does(weights, limits, data):
    mixture = Mixture(weights, limits[: len(weights)])
    sources, numbers = mixture.turns(0, 800)
    first = data.draw(st.integers(0, len(sources)))
    count = data.draw(st.integers(0, 100))
    there = mixture.turns(first, count)
    upto = min(first + count, 800)
    assert np.array_equal(there[0][: upto - first], sources[first:upto])
    assert np.array_equal(there[1][: upto - first], numbers[first:upto])
    assert mixture.counts(first) == [(sources[:first] == i).sum() for i in range(len(weights))]


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, LIMITS)
def test_a_source_serves_each_of_its_windows_once_and_retires(weights, limits):
    limits = limits[: len(weights)]
    mixture = Mixture(weights, limits)
    if None in limits:
        assert mixture.windows is None
    else:
        assert mixture.windows == sum(limits)  # type: ignore[arg-type]
    sources, numbers = mixture.turns(0, 2000)
    for source, limit in enumerate(limits):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert limit is None or len(mine) <= limit
    if mixture.windows is not None and mixture.windows <= 2000:
        assert len(sources) == mixture.windows


def test_the_others_take_over_in_proportion():
    mixture = Mixture([1, 2, 1], [100, None, None])
    sources, _ = mixture.turns(0, 4000)
    assert [(sources[:400] == i).sum() for i in range(3)] == [100, 200, 100]
    assert [(sources[400:] == i).sum() for i in range(3)] == [0, 2400, 1200]


def test_no_source_left():
    mixture = Mixture([1, 1], [0, 3])
    assert mixture.windows == 3
    assert mixture.turns(2, 10)[0].tolist() == [1]
    assert mixture.counts(3) == [0, 3]
