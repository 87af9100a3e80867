from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.mixture import Mixture

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)
LIMITS = st.lists(st.none() | st.integers(0, 300), min_size=6, max_size=6)


def test_two_sources_have_exact_shares():
    sources, _ = Mixture([0.7, 0.3], [None, None]).locate(0, 10_000)
    assert (sources == 0).sum() == 7000
    for count in range(1, 10_001):
        assert abs((sources[:count] == 0).sum() - Fraction(7, 10) * count) <= 1


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_shares_are_exact_at_any_position(weights, sequences):
    counts = Mixture(weights, [None] * len(weights)).counts(sequences)
    exact = [Fraction(str(weight)) for weight in weights]
    assert sum(counts) == sequences
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count - sequences * weight / sum(exact)) <= max(1, len(weights) - 1)


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, LIMITS, st.data())
def test_locate_equals_counting_from_the_start(weights, limits, data):
    mixture = Mixture(weights, limits[: len(weights)])
    sources, numbers = mixture.locate(0, 800)
    first = data.draw(st.integers(0, len(sources)))
    count = data.draw(st.integers(0, 100))
    located = mixture.locate(first, count)
    stop = min(first + count, 800)
    assert np.array_equal(located[0][: stop - first], sources[first:stop])
    assert np.array_equal(located[1][: stop - first], numbers[first:stop])
    assert mixture.counts(first) == [(sources[:first] == i).sum() for i in range(len(weights))]


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, LIMITS)
def test_each_sequence_is_served_once_and_sources_retire(weights, limits):
    limits = limits[: len(weights)]
    mixture = Mixture(weights, limits)
    if None in limits:
        assert mixture.sequences is None
    else:
        assert mixture.sequences == sum(limits)  # type: ignore[arg-type]
    sources, numbers = mixture.locate(0, 2000)
    for source, limit in enumerate(limits):
        own = numbers[sources == source]
        assert np.array_equal(own, np.arange(len(own)))
        assert limit is None or len(own) <= limit
    if mixture.sequences is not None and mixture.sequences <= 2000:
        assert len(sources) == mixture.sequences


def test_share_of_a_retired_source_is_split_in_proportion():
    mixture = Mixture([1, 2, 1], [100, None, None])
    sources, _ = mixture.locate(0, 4000)
    assert [(sources[:400] == i).sum() for i in range(3)] == [100, 200, 100]
    assert [(sources[400:] == i).sum() for i in range(3)] == [0, 2400, 1200]


def test_mixture_ends_when_all_sources_retire():
    mixture = Mixture([1, 1], [0, 3])
    assert mixture.sequences == 3
    assert mixture.locate(2, 10)[0].tolist() == [1]
    assert mixture.counts(3) == [0, 3]
