"""Chance levels: against scipy, against exact enumeration, against simulation, and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from tombola.analysis.chance import interval, interval_of_two, moments, support


def exact(size: int, sets: list[int]) -> np.ndarray:
    """P(X = x) for x in 0..size, by conditioning on one set after the other."""
    distribution = np.zeros(size + 1)
    distribution[sets[0]] = 1.0
    for count in sets[1:]:
        following = np.zeros(size + 1)
        for x in np.nonzero(distribution)[0]:
            following += distribution[x] * stats.hypergeom.pmf(np.arange(size + 1), size, x, count)
        distribution = following
    return distribution


def test_moments_of_two_small_sets_by_listing_all_of_them() -> None:
    counts = [
        len({*a} & {*b}) for a in itertools.combinations(range(5), 3) for b in itertools.combinations(range(5), 2)
    ]
    mean, variance = moments(5, [3, 2])
    assert mean == pytest.approx(np.mean(counts))
    assert variance == pytest.approx(np.var(counts))


def test_moments_of_three_small_sets_by_listing_all_of_them() -> None:
    sets = [itertools.combinations(range(5), s) for s in (4, 3, 2)]
    counts = [len({*a} & {*b} & {*c}) for a, b, c in itertools.product(*sets)]
    mean, variance = moments(5, [4, 3, 2])
    assert mean == pytest.approx(np.mean(counts))
    assert variance == pytest.approx(np.var(counts))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_moments_are_those_of_the_exact_distribution(size: int, shares: list[float]) -> None:
    sets = [round(share * size) for share in shares]
    probabilities, x = exact(size, sets), np.arange(size + 1)
    mean, variance = moments(size, sets)
    assert mean == pytest.approx(probabilities @ x, abs=1e-9)
    assert variance == pytest.approx(probabilities @ x**2 - (probabilities @ x) ** 2, abs=1e-8)


def test_variance_does_not_cancel_where_nearly_all_is_alive() -> None:
    size = 10_000_000
    _, variance = moments(size, [size - 1, size - 1])
    assert variance == pytest.approx(stats.hypergeom.var(size, size - 1, size - 1), rel=1e-3)


def test_interval_of_the_moments_of_a_binomial_is_that_of_the_binomial() -> None:
    n, p = (each.ravel() for each in np.meshgrid([3, 10, 77, 1000], [0.03, 0.4, 0.5, 0.9]))
    low, high = interval(n * p, n * p * (1 - p), np.zeros_like(n), n)
    assert (low == stats.binom.ppf(0.025, n, p)).all()
    assert (high == stats.binom.ppf(0.975, n, p)).all()


@pytest.mark.parametrize("largest", [12, 300, 5000])
def test_interval_of_two_is_the_hypergeometric_one(largest: int) -> None:
    random = np.random.default_rng(largest)
    size = random.integers(1, largest, 400)
    first, second = (size * random.random(400) ** 2).astype(int), (size * random.random(400) ** 0.5).astype(int)
    first[:20], second[20:40] = size[:20], 0
    low, high = interval_of_two(size, [first, second])
    assert (low == stats.hypergeom.ppf(0.025, size, first, second)).all()
    assert (high == stats.hypergeom.ppf(0.975, size, first, second)).all()


def test_interval_of_two_in_a_big_layer_is_at_most_one_off() -> None:
    size = np.full(12, 2_359_296)
    first = (size * 0.8 ** np.arange(1, 13)).astype(int)
    low, high = interval_of_two(size, [first, first // 2])
    assert np.abs(low - stats.hypergeom.ppf(0.025, size, first, first // 2)).max() <= 1
    assert np.abs(high - stats.hypergeom.ppf(0.975, size, first, first // 2)).max() <= 1


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 80), st.lists(st.floats(0, 1), min_size=3, max_size=6))
@example(21, [0.875, 0.9375, 0.71875])  # a narrow support, one end of which is not in the tail
def test_interval_of_more_than_two_is_at_most_one_element_off(size: int, shares: list[float]) -> None:
    sets = [round(share * size) for share in shares]
    probabilities = exact(size, sets)
    up_to = probabilities.cumsum()
    mean, variance = moments(np.array([size]), np.array(sets)[:, None])
    low, high = (int(bound[0]) for bound in interval(mean, variance, *support([size], np.array(sets)[:, None])))
    assert abs(low - int(np.searchsorted(up_to, 0.025 - 1e-12))) <= 1
    assert abs(high - int(np.searchsorted(up_to, 0.975 - 1e-12))) <= 1
    assert probabilities[max(0, low - 1) : high + 2].sum() >= 0.95 - 1e-12


def test_intervals_by_simulation() -> None:
    size, sets, repetitions = 400, [200, 150, 240], 4000
    random = np.random.default_rng(0)
    drawn = [random.random((repetitions, size)).argsort(axis=1) < count for count in sets]
    counts = (drawn[0] & drawn[1] & drawn[2]).sum(axis=1)
    sides = np.array(sets)[:, None]
    mean, variance = moments(np.array([size]), sides)
    low, high = interval(mean, variance, *support([size], sides))
    assert counts.mean() == pytest.approx(float(mean[0]), abs=4 * float(variance[0]) ** 0.5 / repetitions**0.5)
    assert counts.var() == pytest.approx(float(variance[0]), rel=0.1)
    inside = ((counts >= low) & (counts <= high)).mean()
    assert 0.94 < inside < 0.98


def test_no_chance_is_left_where_one_set_has_everything() -> None:
    low, high = interval_of_two(10, [10, 4])
    assert (int(low), int(high)) == (4, 4)
    some = np.arange(97)
    assert not moments(np.full(97, 97), np.stack([np.full(97, 97), some]))[1].any(), "not even by rounding"
    mean, variance = moments(np.array([10]), np.array([[10], [10], [4]]))
    assert [int(b[0]) for b in interval(mean, variance, *support([10], np.array([[10], [10], [4]])))] == [4, 4]
