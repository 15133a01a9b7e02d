"""Chance: the number of connections that independent random masks share.

A random mask of a layer is a uniformly random set of s of its n connections. Of k independent ones with s_1..s_k
connections the number X in common has the factorial moments E[X (X-1) .. (X-r+1)] = (n)_r prod_i (s_i)_r / (n)_r, with
(n)_r = n (n-1) .. (n-r+1), since each of the (n)_r ordered choices of r connections lies in set i with probability
(s_i)_r / (n)_r. For k = 2, X is hypergeometric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special

Numbers: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

LEVEL = 0.95
"""Least coverage of the intervals for two sets; for more sets it is approximate, see `interval`."""

_MOST_SUMMED = 2500  # largest variance of a hypergeometric distribution for which probabilities are summed


def moments(size: npt.ArrayLike, sets: npt.ArrayLike) -> tuple[Numbers, Numbers]:
    """Return the exact mean and variance of the number of elements that k independent random sets have in common.

    mean = n prod_i (s_i / n), variance = E[X (X-1)] + mean - mean^2.

    Args:
        size: n, number of all elements, 1 or more; shape (...).
        sets: s_1..s_k, number of elements of each set, in 0..n; shape (k, ...).

    >>> mean, variance = moments(10, [5, 4])
    >>> float(mean), round(float(variance), 4)
    (2.0, 0.6667)
    """
    n = np.asarray(size, dtype=np.float64)
    s = np.asarray(sets, dtype=np.float64)
    mean = n * np.prod(s / n, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # E[X] / mean^2 = 1 + expm1(...), without cancellation when almost everything is alive.
        ratio = np.log1p(-1 / n) + np.log1p(-(n - s) / (s * (n - 1))).sum(axis=0)
        variance = mean * (1 + mean * np.expm1(ratio))
    settled = (mean == 0) | (np.sum(s < n, axis=0) <= 1)  # a set is empty, or all but one contain everything
    return mean, np.where(settled, 0.0, np.maximum(variance, 0.0))


def support(size: npt.ArrayLike, sets: npt.ArrayLike) -> tuple[Counts, Counts]:
    """Return the least and the largest number of elements that k sets can have in common.

    >>> [int(bound) for bound in support(10, [8, 7])]
    [5, 7]
    """
    n, s = np.asarray(size, dtype=np.int64), np.asarray(sets, dtype=np.int64)
    return np.maximum(0, s.sum(axis=0) - (len(s) - 1) * n), s.min(axis=0)


def interval(mean: Numbers, variance: Numbers, least: Counts, largest: Counts) -> tuple[Counts, Counts]:
    """Return the central 95 % interval of the number of common elements, from a binomial of equal mean and variance.

    The binomial has p' = 1 - variance / mean and n' = mean / p', which need not be an integer. Its distribution
    function is the regularised incomplete beta function, I_{1-p'}(n' - x, x + 1). Hypergeometric variables and their
    sums are sums of independent indicators, whose distribution is close to that binomial (Ehm, Statistics & Probability
    Letters 11, 1991). The same holds for the number common to more than two sets. Each bound differs by at most one
    element from that of the exact distribution. This matters only if the expected number is small: the coverage may
    then be below 95 %.

    Args:
        mean, variance: see `moments`; those of independent layers add up. Any shape.
        least, largest: see `support`; of the same shape.
    """
    shape = mean.shape
    mean, variance, least, largest = mean.ravel(), variance.ravel(), least.ravel(), largest.ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(variance > 0, 1 - variance / mean, 1.0)
        n = mean / p

    def below_or_at(x: Numbers, rows: npt.NDArray[np.intp]) -> Numbers:
        a = n[rows] - x
        inside = special.betainc(np.maximum(a, 1e-300), x + 1, 1 - p[rows])
        return np.where(a <= 0, 1.0, inside)

    whole = np.rint(mean).astype(np.int64)
    settled = variance == 0
    bounds = []
    for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        guess = _guess(mean, variance, p, q)
        found = _quantile(below_or_at, q, guess, np.where(settled, whole, least), np.where(settled, whole, largest))
        bounds.append(found)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def interval_of_two(size: npt.ArrayLike, sets: npt.ArrayLike) -> tuple[Counts, Counts]:
    """Return the central 95 % interval of the number of elements that two random sets have in common.

    Low and high are the smallest x with P(X <= x) >= 0.025 and 0.975 for a hypergeometric X. They are exact for
    standard deviations up to 50. Above, they are those of `interval`, which differ by at most one element.

    Args:
        size: n, shape (...).
        sets: s_1 and s_2, shape (2, ...).

    >>> [int(bound) for bound in interval_of_two(10, [5, 4])]
    [1, 3]
    """
    n, s = np.broadcast_arrays(np.asarray(size, dtype=np.int64), np.asarray(sets, dtype=np.int64))
    total, first, second = n[0].ravel(), s[0].ravel(), s[1].ravel()
    mean, variance = moments(total, [first, second])
    low, high = interval(mean, variance, *support(total, [first, second]))
    summed = np.argsort(variance)[: np.count_nonzero(variance <= _MOST_SUMMED)]
    for start in range(0, len(summed), 256):
        rows = summed[start : start + 256]
        low[rows], high[rows] = _sum_exactly(total[rows], first[rows], second[rows], float(variance[rows[-1]]))
    return low.reshape(s.shape[1:]), high.reshape(s.shape[1:])


def _sum_exactly(n: Counts, first: Counts, second: Counts, variance: float) -> tuple[Counts, Counts]:
    """Return the exact interval of hypergeometric distributions whose variances are at most `variance`.

    P(x + 1) / P(x) = (s_1 - x) (s_2 - x) / ((x + 1) (n - s_1 - s_2 + x + 1)), from 8 standard deviations below the mean
    to 8 above, beyond which less than 1e-9 lies.
    """
    reach = int(8 * variance**0.5) + 8
    least, largest = support(n, [first, second])
    start = np.maximum(least, first * second // n - reach)
    x = start[:, None] + np.arange(2 * reach + 1)
    there = x < largest[:, None]  # there is an x + 1
    last = np.minimum(x, largest[:, None] - 1).astype(np.float64)
    s1, s2, rest = first[:, None], second[:, None], (n - first - second)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((s1 - last) * (s2 - last) / ((last + 1) * (rest + last + 1)))
    log = np.zeros((len(n), x.shape[1] + 1))
    np.cumsum(np.where(there, ratio, -np.inf), axis=1, out=log[:, 1:])
    up_to = np.exp(log - log.max(axis=1, keepdims=True)).cumsum(axis=1)
    up_to /= up_to[:, -1:]
    low, high = (start + (up_to < q).sum(axis=1) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return low, high


def _guess(mean: Numbers, variance: Numbers, p: Numbers, q: float) -> Counts:
    """The quantile of the normal distribution, with the first correction for skewness (Cornish and Fisher)."""
    z = float(special.ndtri(q))
    skewness_times_sd = 1 - 2 * p
    return np.rint(mean + z * np.sqrt(variance) + skewness_times_sd * (z * z - 1) / 6 - 0.5).astype(np.int64)


def _quantile(
    below_or_at: Callable[[Numbers, npt.NDArray[np.intp]], Numbers],
    q: float,
    guess: Counts,
    least: Counts,
    largest: Counts,
) -> Counts:
    """Return, for each row, the smallest x in least..largest with P(X <= x) >= q.

    From the guess outwards in steps that double until the answer is enclosed, then by halving.
    """
    low, high = least - 1, np.array(largest)  # P(X <= low) < q <= P(X <= high) always
    at = np.clip(guess, least, largest)
    step = np.ones_like(at)
    rows = np.nonzero(high - low > 1)[0]
    while len(rows):
        x = at[rows]
        enough = below_or_at(x.astype(np.float64), rows) >= q
        high[rows[enough]] = x[enough]
        low[rows[~enough]] = x[~enough]
        width = high[rows] - low[rows]
        outwards = np.where(enough, high[rows] - step[rows], low[rows] + step[rows])
        middle = low[rows] + width // 2
        inside = (outwards > low[rows]) & (outwards < high[rows])
        at[rows] = np.where(inside, outwards, middle)
        step[rows] *= 2
        rows = rows[width > 1]
    return high
