"""How many seeds would decide: against tables of the t test's power, SciPy's non-central t, and simulation."""

from math import exp, inf, isnan, nan, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lbstudy.analysis import stats
from lbstudy.analysis.report import power
from lbstudy.analysis.tables.targets import speed_ratio


def mean_of(value: float, sd: float, n: int) -> stats.Mean:
    margin = stats.t_quantile(n) * sd / sqrt(n)
    return stats.Mean(value, sd, n, value - margin, value + margin)


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 34), (0.8, 15), (1.0, 10), (1.5, 6), (0.2, inf)])
def test_seeds_are_those_of_power_tables(effect: float, seeds: float):
    """Paired t test, two-sided 5 %, power 80 %: 34, 15 and 10 pairs for 0.5, 0.8 and 1; 199 for 0.2 (G*Power)."""
    assert power.seeds_needed(mean_of(3 + 2 * effect, 2, 3), 3) == seeds
    assert power.seeds_needed(mean_of(3 - 2 * effect, 2, 3), 3) == seeds


def test_one_seed_less_has_too_little_power():
    def found(n: int) -> float:
        return float(scipy_stats.nct.sf(scipy_stats.t.ppf(0.975, n - 1), n - 1, 0.7 * sqrt(n)))

    n = int(power.seeds_needed(mean_of(0.7, 1, 5), 0))
    assert found(n - 1) < 0.8 <= found(n)
    samples = np.random.default_rng(0).normal(0.7, 1, (4000, n))
    decided = np.mean([stats.mean(sample).low > 0 for sample in samples])
    assert decided == pytest.approx(found(n), abs=0.02)


def test_what_hides_in_an_epoch_does_not_shrink_with_seeds():
    def ratio(first: list[float], second: list[float]) -> stats.Mean:
        return power.in_logarithms(speed_ratio(pd.Series(first), pd.Series(second)))

    assert power.seeds_needed(ratio([29, 29, 29], [30, 30, 30]), 0) == inf
    apart = ratio([20, 29, 20], [30, 28, 31])
    assert 3 < power.seeds_needed(apart, 0) < 100
    same = apart._replace(low=-0.9, high=0.9)  # as far from the threshold, and known less well
    assert power.seeds_needed(same, 0) >= power.seeds_needed(apart, 0)


def test_a_ratio_in_logarithms():
    found = power.in_logarithms(stats.Mean(2.0, 0.3, 3, 0.0, exp(1)))
    assert found[:4] == pytest.approx((0.6931, 0.3, 3, -inf), abs=1e-4)
    assert found.high == pytest.approx(1)
    assert isnan(power.in_logarithms(stats.Mean(nan, nan, 0, nan, nan)).value)


def test_a_row_of_a_table_is_read_back():
    sample = [0.02, 0.03, -0.01, 0.04]
    found = stats.mean(sample)
    row = {"gap": found.value, "gap_low": found.low, "gap_high": found.high, "n": 4}
    assert tuple(power.of_row(row, "gap")) == pytest.approx(tuple(found))


def test_sentences():
    assert power.sentence([mean_of(1, 1, 3)], 0).startswith("7 more seeds, 10 in all,")
    assert power.sentence([mean_of(1, 1, 3), mean_of(1, 2, 3)], 0).startswith("31 more seeds, 34 in all,")
    assert power.sentence([mean_of(1.5, 1, 5)], 0).startswith("1 more seed, 6 in all,")
    assert "over 100" in power.sentence([mean_of(0.001, 1, 3)], 0)
    assert power.sentence([stats.mean([0.5])], 0) == power.ONE_SEED
    assert power.sentence([stats.mean([0.5, 0.5])], 0) == power.NO_SPREAD
    assert power.sentence([stats.mean([])], 0) == ""
    assert power.sentence([], 0) == ""


@pytest.mark.parametrize(
    ("counts", "seeds"),
    [((0, 3, 3, 3), 4), ((3, 3, 0, 3), 4), ((1, 2, 2, 2), None), ((2, 3, 2, 3), 0), ((1, 3, 3, 3), None)],
)
def test_seeds_of_fishers_test(counts: tuple[int, int, int, int], seeds: int | None):
    words = power.sentence_of_counts(*counts, level=0.05)
    if seeds == 0:
        assert "would not decide" in words
        return
    first, of_first, second, of_second = counts
    n = int(words.split(" ")[0])
    assert seeds in (None, n)

    def p(n: int) -> float:
        reached = [round(n * first / of_first), round(n * second / of_second)]
        return float(scipy_stats.fisher_exact([[reached[0], n - reached[0]], [reached[1], n - reached[1]]]).pvalue)

    assert p(n) <= 0.05 < p(n - 1)
