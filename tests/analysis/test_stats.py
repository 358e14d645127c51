"""Intervals against closed forms, SciPy and simulation."""

from collections.abc import Callable
from math import inf, isnan, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy import stats as scipy_stats

from lbstudy.analysis import stats

SIMULATIONS = 4000  # the standard error of a coverage of 0.95 is then 0.0034


def series(*values: float) -> pd.Series:
    return pd.Series(values, dtype=float)


def test_mean_agrees_with_scipy():
    sample = [0.91, 0.93, 0.9, 0.95]
    found = stats.mean(sample)
    expected = scipy_stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert (found.value, found.sd, found.n) == pytest.approx((np.mean(sample), np.std(sample, ddof=1), 4))


def test_one_seed_has_a_mean_and_no_interval():
    found = stats.mean([0.9, np.nan])
    assert (found.value, found.n) == (0.9, 1)
    assert isnan(found.sd)
    assert isnan(found.low)
    assert isnan(found.high)
    assert not stats.excludes_zero(found)
    assert stats.mean([]).n == 0


def test_difference_is_paired_by_repeat():
    first = pd.Series([0.9, 0.8, 0.7, 0.6], index=[0, 1, 2, 3])
    second = pd.Series([0.5, 0.7, 0.6], index=[9, 1, 0])  # in another order, one repeat missing, one of its own
    found = stats.paired_difference(first, second)
    expected = scipy_stats.ttest_rel([0.9, 0.8], [0.6, 0.7]).confidence_interval(0.95)
    assert (found.value, found.n) == (pytest.approx(0.2), 2)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("n", [2, 5])
def test_interval_of_a_mean_has_its_coverage(n: int):
    samples = np.random.default_rng(1).normal(3, 2, (SIMULATIONS, n))
    intervals = [stats.mean(sample) for sample in samples]
    assert np.mean([i.low <= 3 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)


def test_interval_of_a_paired_difference_has_its_coverage():
    random = np.random.default_rng(2)
    seeds = random.normal(0, 1, (SIMULATIONS, 5))  # what two cells have in common, and a pairing takes out
    first, second = (seeds + shift + random.normal(0, 0.3, (SIMULATIONS, 5)) for shift in (2, 1.5))
    intervals = [stats.paired_difference(pd.Series(a), pd.Series(b)) for a, b in zip(first, second, strict=True)]
    assert np.mean([i.low <= 0.5 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([i.high - i.low for i in intervals]) < 1.2  # unpaired, it would be about 3


@pytest.mark.parametrize("n", [3, 5, 10])
def test_resolvable_difference_is_seen_in_four_of_five_studies(n: int):
    true = stats.smallest_resolvable(sd=2, n=n)
    samples = np.random.default_rng(3).normal(true, 2, (SIMULATIONS, n))
    seen = np.mean([stats.excludes_zero(stats.mean(sample)) for sample in samples])
    assert seen == pytest.approx(0.8, abs=0.02)


def test_resolvable_difference_of_many_seeds_is_the_normal_formula():
    n, sd_run = 10_000, 0.15
    found = stats.smallest_resolvable(sqrt(2) * sd_run, n)
    assert n == pytest.approx(2 * (1.96 + 0.84) ** 2 * sd_run**2 / found**2, rel=2e-3)
    assert isnan(stats.smallest_resolvable(1, 1))


def test_values_that_are_equal_have_no_interval():
    """Not one of width 0, which would exclude zero."""
    for found in (
        stats.mean([0.9, 0.9, 0.9]),
        stats.mean_accuracy([0.9, 0.9, 0.9]),
        stats.paired_difference(series(0.9, 0.8, 0.7), series(0.7, 0.6, 0.5)),  # 0.2 but for rounding
    ):
        assert (found.sd, found.n) == (0, 3)
        assert isnan(found.low)
        assert isnan(found.high)
        assert not stats.excludes_zero(found)
        assert isnan(stats.smallest_resolvable(found.sd, found.n))
    for numerator in (series(1, 2, 3), series(0, 0, 0)):
        same = stats.ratio(numerator, 4 * series(1, 2, 3))
        assert (same.value, same.shape) == (numerator[0] / 4, "none")
        assert isnan(same.low)


def test_interval_of_an_accuracy_is_that_of_its_logit():
    sample = [0.91, 0.93, 0.9, 0.95]
    found = stats.mean_accuracy(sample)
    margin = scipy_stats.t.ppf(0.975, 3) * scipy_stats.sem(sample) / (found.value * (1 - found.value))
    ends = special.expit(special.logit(np.mean(sample)) + np.array([-margin, margin]))
    assert (found.low, found.high) == pytest.approx(tuple(ends))
    wide = stats.mean_accuracy([0.95, 0.95, 0.185])
    assert 0 < wide.low < wide.high < 1
    assert isnan(stats.mean_accuracy([1, 1, 1]).low)
    assert isnan(stats.mean_accuracy([0.5]).low)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_interval_of_an_accuracy_has_its_coverage(n: int):
    """0.7 +- 0.2 (of a beta distribution), and 0.98 of 360 images, where runs may agree to the image."""
    random = np.random.default_rng(6)
    far = random.beta(2.975, 1.275, (SIMULATIONS, n))
    near = random.binomial(360, 0.98, (SIMULATIONS, n)) / 360

    def covered(interval: Callable[[np.ndarray], stats.Mean], samples: np.ndarray, true: float) -> float:
        found = [interval(sample) for sample in samples]
        return float(np.mean([i.low <= true <= i.high for i in found if not isnan(i.low)]))

    assert covered(stats.mean_accuracy, far, 0.7) == pytest.approx(0.95, abs=0.01)
    assert covered(stats.mean, far, 0.7) < 0.943  # what the t interval would have
    assert 0.94 < covered(stats.mean_accuracy, near, 0.98) < 0.975


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.3, 0.7, 1.5])
def test_equal_accuracies_are_told_apart_in_one_of_twenty_studies(n: int, spread: float):
    """Two cells that are equally good, to whole images of 360: few are told apart, and none by an interval of 0."""
    random = np.random.default_rng(7)
    images = np.round(random.uniform(350, 351, (2000, 1, 1)) + random.normal(0, spread, (2000, 2, n)))
    found = [stats.paired_difference(*map(pd.Series, pair / 360)) for pair in images]
    assert np.mean(list(map(stats.excludes_zero, found))) < 0.055
    assert all(isnan(i.low) or i.high - i.low > 1 / 360 / n for i in found)


def test_ratio_bounds_are_where_the_t_test_turns():
    a, b = series(1.0, 1.4, 0.8, 1.3), series(2.0, 2.2, 1.7, 2.4)
    found = stats.ratio(a, b)
    assert found.shape == "bounded"
    assert found.low < found.value < found.high
    for bound in (found.low, found.high):
        assert scipy_stats.ttest_1samp(a - bound * b, 0).pvalue == pytest.approx(0.05)


def test_ratio_to_an_uncertain_denominator_is_unbounded():
    noise = series(-1, 1, -1, 1)
    outside = stats.ratio(series(5, 5.1, 5.2, 4.9), 0.1 + noise)
    assert outside.shape == "outside"
    assert outside.low < outside.high
    assert not outside.contains(0)  # the numerator is no zero, so the ratio is none
    assert outside.contains(outside.value)
    for bound in (outside.low, outside.high):
        t_test = scipy_stats.ttest_1samp(series(5, 5.1, 5.2, 4.9) - bound * (0.1 + noise), 0)
        assert t_test.pvalue == pytest.approx(0.05)
    everything = stats.ratio(series(1, 1, -1, -1), 0.1 + noise)
    assert everything[2:] == (-inf, inf, "everything")


def test_ratio_of_too_few_pairs():
    one = stats.ratio(series(1), series(2))
    assert (one.value, one.n, one.shape) == (0.5, 1, "none")
    assert isnan(one.low)
    assert stats.ratio(series(), series()).n == 0
    assert isnan(stats.ratio(series(1), series(0)).value)


@pytest.mark.parametrize(("gap_mean", "bounded"), [(2.0, True), (0.3, False)])
def test_share_closed_has_its_coverage(gap_mean: float, bounded: bool):
    random = np.random.default_rng(4)
    shape = (SIMULATIONS // 2, 5)
    shared = random.normal(0, 0.3, shape)  # the gap and what remains of it share the small-batch run
    gaps = gap_mean + shared + random.normal(0, 0.2, shape)
    remaining = 0.4 * gap_mean + shared + random.normal(0, 0.2, shape)
    found = [stats.share_closed(pd.Series(g), pd.Series(r)) for g, r in zip(gaps, remaining, strict=True)]
    assert np.mean([share.contains(0.6) for share in found]) == pytest.approx(0.95, abs=0.02)
    assert (np.mean([share.shape == "bounded" for share in found]) > 0.99) == bounded


def test_share_closed_on_constructed_data():
    gap = series(0.10, 0.12, 0.08)
    assert stats.share_closed(gap, 0.25 * gap).value == pytest.approx(0.75)
    assert stats.share_closed(gap, gap).value == pytest.approx(0)
    assert stats.share_closed(gap, -gap).value == pytest.approx(2)  # overshoots


def test_rank_correlation_agrees_with_scipy():
    x, y = [1, 2, 3, 4, 5, np.nan, 5], [2, 1, 4, 3, 7, 0, 7]
    found = stats.rank_correlation(x, y)
    assert found.value == pytest.approx(scipy_stats.spearmanr([1, 2, 3, 4, 5, 5], [2, 1, 4, 3, 7, 7]).statistic)
    assert found.n == 6
    assert found.low < found.value < found.high


def test_permutation_test_is_exact_for_few_cells():
    found = stats.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    assert found.value == pytest.approx(1)
    assert found.p == pytest.approx(2 / 24)  # two of the 4! orders are as extreme
    assert isnan(found.low)


def test_rank_correlation_that_cannot_be_computed():
    assert isnan(stats.rank_correlation([1, 2, 3], [5, 5, 5]).value)
    assert isnan(stats.rank_correlation([1], [2]).value)
    assert stats.rank_correlation([], []).n == 0


@pytest.mark.parametrize(("n", "rho"), [(8, 0.5), (16, 0.0), (16, 0.8), (32, 0.8)])
def test_interval_of_a_rank_correlation_has_its_coverage(n: int, rho: float):
    random = np.random.default_rng(5)
    x = random.normal(size=(SIMULATIONS, n))
    y = rho * x + sqrt(1 - rho**2) * random.normal(size=(SIMULATIONS, n))
    x, y = (scipy_stats.zscore(scipy_stats.rankdata(z, axis=1), axis=1) for z in (x, y))
    true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a bivariate normal with Pearson's rho
    covered = [low <= true <= high for low, high in (stats.rank_interval(r, n) for r in np.mean(x * y, axis=1))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_no_interval_from_three_cells_or_a_perfect_correlation():
    assert all(map(isnan, stats.rank_interval(0.5, 3)))
    assert all(map(isnan, stats.rank_interval(-1.0, 9)))


def beta(mean: float, sd: float) -> tuple[float, float]:
    """The parameters of the beta distribution with these."""
    size = mean * (1 - mean) / sd**2 - 1
    return mean * size, (1 - mean) * size


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(
    ("mean", "sd"),
    [(0.5, 0.01), (0.5, 0.3), (0.7, 0.01), (0.7, 0.2), (0.95, 0.005), (0.95, 0.05), (0.99, 0.002), (0.99, 0.01)],
)
def test_interval_of_an_accuracy_keeps_its_coverage_at_strong_spreads(mean: float, sd: float, n: int):
    """Within two points of 95 %, from runs that agree to runs that spread over all that accuracies can be."""
    samples = np.random.default_rng(7).beta(*beta(mean, sd), (SIMULATIONS, n))
    found = [stats.mean_accuracy(sample) for sample in samples]
    assert np.mean([i.low <= mean <= i.high for i in found]) == pytest.approx(0.95, abs=0.02)
    assert all(0 < i.low < i.high < 1 for i in found)


@pytest.mark.parametrize(("n", "least"), [(3, 0.95), (5, 0.9)])
def test_an_interval_of_runs_of_which_some_hardly_learn_holds_the_mean(n: int, least: float):
    """Two of three runs hardly learn. Where the seeds show both kinds the interval has the mean of all runs; where they
    show one kind, as of three seeds in a third of the studies, none can."""
    random = np.random.default_rng(8)
    learns = random.random((SIMULATIONS, n)) < 1 / 3
    samples = np.where(learns, 0.9, 0.1) + random.normal(0, 0.01, (SIMULATIONS, n))
    both = samples[learns.any(axis=1) & ~learns.all(axis=1)]
    found = [stats.mean_accuracy(sample) for sample in both]
    true = 0.9 / 3 + 0.1 * 2 / 3
    assert np.mean([i.low <= true <= i.high for i in found]) >= least
    assert all(0 < i.low < i.high < 1 for i in found)
    t = [stats.mean(sample) for sample in both]
    assert np.mean([i.low < 0 or i.high > 1 for i in t]) > 0.5  # which is no interval of an accuracy


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (271.6, 2, "270"),
        (99.6, 2, "100"),
        (12.34, 2, "12"),
        (0.0456, 2, "0.046"),
        (1.3e-5, 2, "1.3e-05"),
        (1284.0, 3, "1280"),
        (-1284.0, 3, "-1280"),
        (4e17, 3, "4e+17"),
        (0, 3, "0"),
        (inf, 2, "inf"),
        (float("nan"), 2, "nan"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, digits, expected):
    assert stats.written(value, digits) == expected
