"""What it would take to tell: how many seeds would decide a comparison that is open now.

It is the power calculation of a t test of paired differences (Cohen 1988, chapter 2): the number of seeds at which
`stats.smallest_resolvable` falls to the distance of the estimate from the threshold. It takes estimate and spread for
the truth, as the seeds so far show them, and three seeds show either badly: it is a hint of the order of size, and no
promise. Where an estimate sits on the threshold no number of seeds helps, and that is what is said then.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isnan, log, nan, sqrt
from typing import Any

import numpy as np

from lbstudy.analysis import stats

MOST_SEEDS = 100
"""Where it takes more, more seeds are no way."""

FAILING = "More seeds would not help while runs of these cells fail; a configuration that trains at every seed would."
ONE_SEED = "A second seed would show the spread, without which nothing can be told."
NO_SPREAD = "More seeds may show a spread, without which there is no interval."
OPPOSED = "More seeds would not decide it: at these estimates {} lie on different sides."


def seeds_needed(found: stats.Mean, threshold: float) -> float:
    """The seeds, in all, at which an interval like this one is likely (power 80 %) to leave out the threshold.

    Infinite where more than MOST_SEEDS would not do, NaN where no spread is known. An interval may be wider than its
    seeds make it (`targets.speed_ratio`: what can hide in an epoch), and that part does not shrink with them.

    Args:
        found: a t interval, on the scale on which it is symmetric.
        threshold: what it is held against.
    """
    if found.n < 2 or isnan(found.low) or not found.sd > 0:
        return nan
    margin = stats.t_quantile(found.n) * found.sd / sqrt(found.n)
    above, below = found.low + margin - threshold, threshold - (found.high - margin)
    distance = above if found.value > threshold else below
    sizes = range(2, MOST_SEEDS + 1)
    return next((n for n in sizes if stats.smallest_resolvable(found.sd, n) <= distance), inf)


def in_logarithms(ratio: stats.Mean) -> stats.Mean:
    """A ratio whose `sd` is that of its logarithms, with value and interval of the logarithms as well."""
    value, low, high = (log(x) if x > 0 else -inf if x == 0 else nan for x in (ratio.value, ratio.low, ratio.high))
    return ratio._replace(value=value, low=low, high=high)


def of_row(row: dict[str, Any], name: str) -> stats.Mean:
    """The mean and t interval of a row of a table: the columns `name`, `name_low`, `name_high` and `n`."""
    value, low, high, n = (row[column] for column in (name, f"{name}_low", f"{name}_high", "n"))
    sd = nan if isnan(low) else (high - low) / 2 * sqrt(n) / stats.t_quantile(n)
    return stats.Mean(value, sd, n, low, high)


def sentence(found: Iterable[stats.Mean], threshold: float) -> str:
    """What it would take for all of these to leave out the threshold; empty where there is nothing to go by."""
    means = list(found)
    if not means or any(mean.n == 0 for mean in means):
        return ""
    n = min(mean.n for mean in means)
    if n == 1:
        return ONE_SEED
    seeds = [seeds_needed(mean, threshold) for mean in means]
    if any(map(isnan, seeds)):
        return NO_SPREAD
    if inf in seeds:
        return f"More seeds would hardly decide it: the estimate is too near, and it would take over {MOST_SEEDS}."
    most = int(max(seeds))
    more = f"{most - n} more seed{'' if most - n == 1 else 's'}"
    return f"{more}, {most} in all, would probably decide it if estimate and spread stay as they are."


def sentence_of_counts(first: int, of_first: int, second: int, of_second: int, level: float) -> str:
    """What it would take for Fisher's exact test of two counts to fall to the level, if the shares stay."""
    from scipy.stats import fisher_exact  # here, since the import takes most of a second

    for n in range(max(of_first, of_second) + 1, MOST_SEEDS + 1):
        reached = [int(np.rint(n * count / of)) for count, of in ((first, of_first), (second, of_second))]
        if fisher_exact([[count, n - count] for count in reached]).pvalue <= level:
            return f"{n} seeds of each would decide it if as large a share of them got there."
    return "More seeds would not decide it: nearly as large a share of both gets there."
