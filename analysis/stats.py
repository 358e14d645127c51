"""Intervals for a handful of seeds: means, paired differences, the share of a gap that is closed, rank correlation.

All intervals are two-sided 95 % and each holds for itself: nothing is corrected for how many of them a table shows.
What cannot be computed is NaN: one seed has a mean and no interval, and neither have values that are all equal. They
are so where a test set of a few hundred images counts in steps that are wider than what runs differ by; their spread is
then not zero but not known, and an interval of width 0 would exclude everything. The runs of a study are paired, since
repeat i has the same seed in every cell, so two cells are compared by the differences of their repeats. The share of a
gap closed is a ratio of two such means; its interval follows Fieller (J. R. Stat. Soc. B 16, 1954), which, unlike the
delta method, says so when the gap is too uncertain to divide by.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atanh, inf, nan, sqrt, tanh
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy  # its parts load when they are used: the commonest tables need none of them

LEVEL = 0.95
"""Coverage of every interval."""

POWER = 0.8
"""Power that the smallest resolvable difference is stated for."""


EQUAL = 1e-9
"""Values that differ by less than this part of their size are equal: what rounding leaves of a difference is none."""


def written(value: float, digits: int) -> str:
    """A number to so many significant digits, as people write it: 1300, where Python's `g` has 1.3e+03."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if 10**digits <= abs(rounded) < 1e15 else f"{value:.{digits}g}"


class Mean(NamedTuple):
    """A mean of `n` values, their standard deviation (n - 1 in the denominator), and the interval of the mean."""

    value: float
    sd: float
    n: int
    low: float
    high: float


class Ratio(NamedTuple):
    """A ratio of two paired means and its Fieller confidence set.

    `shape` says how to read `low` and `high`: the set is what lies between them (`bounded`), what does not lie
    between them (`outside`), or every number (`everything`, bounds infinite); the last two mean that the denominator
    cannot be told from zero. `none` is no set at all, for lack of a second pair or of any spread.
    """

    value: float
    n: int
    low: float
    high: float
    shape: Literal["bounded", "outside", "everything", "none"]

    def contains(self, value: float) -> bool:
        """Whether the confidence set holds a value."""
        if self.shape == "outside":
            return value <= self.low or value >= self.high
        return self.low <= value <= self.high


class Correlation(NamedTuple):
    """Spearman's rank correlation of `n` pairs, its interval, and the p value of a permutation test against none."""

    value: float
    n: int
    low: float
    high: float
    p: float


def mean(values: Sequence[float] | np.ndarray | pd.Series) -> Mean:
    """The mean with its t interval, value +- t(n - 1) sd / sqrt(n); NaN values do not count."""
    sample = _known(values)
    return _mean(sample, scale=np.abs(sample).max(initial=0))


def mean_accuracy(values: Sequence[float] | np.ndarray | pd.Series) -> Mean:
    """The mean of fractions with an interval that stays between 0 and 1; NaN values do not count.

    It is the t interval on the scale of the logit, expit(logit m +- t(n - 1) sd / (sqrt(n) m (1 - m))), by the delta
    method. There is none where the mean is 0 or 1.
    """
    found = mean(values)
    if not 0 < found.value < 1:
        return found._replace(low=nan, high=nan)
    margin = (found.high - found.value) / (found.value * (1 - found.value))
    centre = scipy.special.logit(found.value)
    low, high = scipy.special.expit([centre - margin, centre + margin])
    return found._replace(low=float(low), high=float(high))


def paired_difference(first: pd.Series, second: pd.Series) -> Mean:
    """The mean of `first - second` over the repeats that both have; both are indexed by repeat."""
    pairs = _paired(first, second)
    return _mean(pairs[0] - pairs[1], scale=np.abs(pairs).max(initial=0))


def smallest_resolvable(sd: float, n: int) -> float:
    """The smallest true difference that `n` pairs are likely to show: two-sided 5 %, power 80 %.

    It is d = delta sd / sqrt(n), with `sd` that of the paired differences and delta the non-centrality at which a t
    test with n - 1 degrees of freedom has that power. For many pairs delta tends to 1.96 + 0.84, and with
    sd^2 = 2 sd_run^2 (independent arms) this is the usual n = 2 (1.96 + 0.84)^2 sd_run^2 / d^2. NaN for n < 2, and
    where the pairs show no spread.
    """
    if n < 2 or not sd > 0:
        return nan
    return float(scipy.special.nctdtrinc(n - 1, 1 - POWER, t_quantile(n))) * sd / sqrt(n)


def ratio(numerator: pd.Series, denominator: pd.Series) -> Ratio:
    """mean(numerator) / mean(denominator) over the repeats that both have, with Fieller's confidence set.

    The set holds every r for which numerator - r denominator has a mean that a t test cannot tell from zero:
    (a - r b)^2 <= t^2 (v_aa - 2 r v_ab + r^2 v_bb), with means a, b and the (co)variances v of the means.
    """
    pairs = _paired(numerator, denominator)
    n = pairs.shape[1]
    if n == 0:
        return Ratio(nan, 0, nan, nan, "none")
    a, b = map(float, pairs.mean(axis=1))
    value = a / b if b else nan
    if n == 1:
        return Ratio(value, n, nan, nan, "none")
    if np.ptp(pairs[0] - value * pairs[1]) <= EQUAL * np.abs(pairs).max():  # the same ratio at every repeat
        return Ratio(value, n, nan, nan, "none")
    (v_aa, v_ab), (_, v_bb) = t_quantile(n) ** 2 * np.cov(pairs) / n
    square, linear, constant = b * b - v_bb, a * b - v_ab, a * a - v_aa
    discriminant = linear * linear - square * constant
    if square > 0:
        root = sqrt(max(discriminant, 0))  # not negative but for rounding: the set holds a / b
        return Ratio(value, n, (linear - root) / square, (linear + root) / square, "bounded")
    if square == 0 or discriminant <= 0:
        return Ratio(value, n, -inf, inf, "everything")
    root = sqrt(discriminant)
    return Ratio(value, n, (linear + root) / square, (linear - root) / square, "outside")


def share_closed(gap: pd.Series, remaining: pd.Series) -> Ratio:
    """1 - mean(remaining) / mean(gap): the share of a gap that is closed. Both are indexed by repeat."""
    return ratio(gap - remaining, gap)


def rank_correlation(first: Sequence[float] | pd.Series, second: Sequence[float] | pd.Series) -> Correlation:
    """Spearman's rank correlation of two columns; pairs with a NaN do not count.

    The interval is `rank_interval`'s; the p value is exact up to seven pairs, and from 9,999 permutations beyond.
    """
    from scipy import stats  # here, since the import takes most of a second

    pairs = np.array([np.asarray(first, float), np.asarray(second, float)])
    x, y = stats.rankdata(pairs[:, ~np.isnan(pairs).any(axis=0)], axis=1)
    n = len(x)
    if n < 2 or not np.ptp(x) or not np.ptp(y):
        return Correlation(nan, n, nan, nan, nan)

    def statistic(shuffled: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean((shuffled - x.mean()) * (y - y.mean()), axis=axis) / (x.std() * y.std())

    test = stats.permutation_test((x,), statistic, permutation_type="pairings", vectorized=True, rng=0)
    value = float(np.clip(test.statistic, -1, 1))
    return Correlation(value, n, *rank_interval(value, n), float(test.pvalue))


def rank_interval(value: float, n: int) -> tuple[float, float]:
    """Interval of Spearman's correlation, tanh(atanh r +- 1.96 sqrt((1 + r^2/2)/(n - 3))).

    Bonett & Wright (Psychometrika 65, 2000). It keeps its coverage from about eight pairs on; with fewer than four,
    or a perfect correlation, there is none.
    """
    if n < 4 or abs(value) > 1 - 1e-12:
        return nan, nan
    margin = float(scipy.special.ndtri((1 + LEVEL) / 2)) * sqrt((1 + value**2 / 2) / (n - 3))
    return tanh(atanh(value) - margin), tanh(atanh(value) + margin)


def excludes_zero(interval: Mean) -> bool:
    """Whether the interval lies on one side of zero; False where there is none."""
    return side(interval.low, interval.high) != 0


def side(low: float, high: float) -> int:
    """The side of zero that an interval lies on: 1, -1, or 0 where it holds zero or there is none."""
    return int(low > 0) - int(high < 0)


def _known(values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    sample = np.asarray(values, float)
    return sample[~np.isnan(sample)]


def _mean(sample: np.ndarray, scale: float) -> Mean:
    """The mean with its t interval, which values that are equal, for numbers of the size `scale`, do not have."""
    n = len(sample)
    if n < 2:
        return Mean(float(sample[0]) if n else nan, nan, n, nan, nan)
    centre, sd = float(sample.mean()), float(sample.std(ddof=1))
    if np.ptp(sample) <= EQUAL * scale:
        return Mean(centre, 0.0, n, nan, nan)
    margin = t_quantile(n) * sd / sqrt(n)
    return Mean(centre, sd, n, centre - margin, centre + margin)


def _paired(first: pd.Series, second: pd.Series) -> np.ndarray:
    """Two rows: the values of the repeats that both series have."""
    pairs = np.array(first.align(second, join="inner"), float)
    return pairs[:, ~np.isnan(pairs).any(axis=0)]


def t_quantile(n: int) -> float:
    """By how many standard errors the t interval of `n` values reaches from their mean."""
    return float(scipy.special.stdtrit(n - 1, (1 + LEVEL) / 2))
