"""How steps to a target fall with the batch size: the critical batch size, and where perfect scaling ends.

Two numbers say how far a larger batch pays. By McCandlish et al. (arXiv 1812.06162, section 2.3)

    S(B) = S_min (1 + B_crit / B):

beyond B_crit the steps hardly fall any more. Zhang et al. (arXiv 2410.21676) need no such curve: theirs is the batch at
which the steps exceed perfect scaling from the smallest batch, S(B_0) B_0 / B, by 20 %.

A run's time T is known to lie between two evaluations, in (low, high], and a run that never reached the target has
high = infinity. All take part by their chance: log T is normal around log S(B), with one standard deviation for all
batch sizes, and the likelihood of a run is what the normal distribution has in its interval (interval-censored
regression). Where times are known exactly these are least squares of the logarithms. The deviation is at least that of
times that lie evenly between their evaluations: that equal runs fall into one interval does not make it zero.

Intervals resample the repeats, each of which is one seed in all cells: they are left out one after the other (delete-1
jackknife), and an estimate x has the interval x +- t(n - 1) s, with s^2 = (n - 1)/n sum (x_-j - mean)^2, but at least
what can hide between the evaluations. Three seeds have but ten different bootstrap samples, whose percentiles cover far
less than they say; tests/analysis/test_scaling.py holds the coverage of these to 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import exp, inf, log, nan, sqrt
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from lbstudy.analysis.stats import t_quantile

EXCESS = 1.2
"""Steps so many times those of perfect scaling end it (Zhang et al.)."""

BETWEEN = 64
"""Points that are looked at between one batch size and the next."""

LEAST_SD, MOST_SD = 0.01, 10.0
"""Bounds of the standard deviation of log T; seeds differ by a hundredth and more."""

FAR = 10.0
"""Levels of log S are looked for within so much of a first guess."""


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN: not known, infinite: nothing bounds it."""

    value: float
    low: float
    high: float


class Runs(NamedTuple):
    """Times to a target; a row per run in each array but `sizes`."""

    sizes: np.ndarray  # batch sizes, ascending
    cell: np.ndarray  # index of the run's batch size
    repeat: np.ndarray
    low: np.ndarray  # steps: last evaluation that did not meet the target
    high: np.ndarray  # steps: first that did; infinite for a miss

    @classmethod
    def of(cls, times: pd.DataFrame) -> Runs:
        """From rows with batch_size, repeat, steps_low and steps; see `targets.times_to_target`."""
        sizes, cell = np.unique(times["batch_size"].to_numpy(float), return_inverse=True)
        return cls(sizes, cell, *(times[name].to_numpy(float) for name in ("repeat", "steps_low", "steps")))

    @property
    def hit(self) -> np.ndarray:
        """Which runs reached the target."""
        return np.isfinite(self.high)

    @property
    def hit_cells(self) -> np.ndarray:
        """Indices of the batch sizes at which some run did."""
        return np.unique(self.cell[self.hit])

    @property
    def unknown(self) -> np.ndarray:
        """The standard deviation of log T between two evaluations, (high - low) / (sqrt(12) high), of each hit."""
        return (1 - self.low[self.hit] / self.high[self.hit]) / sqrt(12)

    def unknown_of_cells(self) -> np.ndarray:
        """The same for each batch size, root mean square; 0 where no run reached the target."""
        squares = np.bincount(self.cell[self.hit], self.unknown**2, len(self.sizes))
        return np.sqrt(squares / np.bincount(self.cell[self.hit], minlength=len(self.sizes)).clip(min=1))

    def only(self, which: np.ndarray) -> Runs:
        """Some of the runs."""
        return Runs(self.sizes, *(column[which] for column in self[1:]))


class Curve(NamedTuple):
    """S(B) = S_min (1 + B_crit / B), by the logarithms of S at two batch sizes: any two numbers are such a curve.

    S is linear in 1 / B. Where it falls as fast as 1 / B between them, or faster, S_min is not positive and B_crit
    infinite; where it does not fall, B_crit is 0.
    """

    small: float  # batch size
    large: float
    log_small: float  # log S there
    log_large: float

    def steps(self, batch_size: np.ndarray) -> np.ndarray:
        """S at batch sizes between the two."""
        return np.exp(_log_steps(self.log_small, self.log_large, _weight(batch_size, self.small, self.large)))

    @property
    def critical(self) -> float:
        """B_crit, between 0 and infinity."""
        return critical_of(self.log_small - self.log_large, self.small, self.large)

    @property
    def least_steps(self) -> float:
        """S_min."""
        examples = (exp(self.log_small) - exp(self.log_large)) / (1 / self.small - 1 / self.large)
        return exp(self.log_large) - examples / self.large


def critical_of(log_fall: float, small: float, large: float) -> float:
    """B_crit of the curve with log S(small) - log S(large) = `log_fall`, which it rises with."""
    if log_fall <= 0:
        return 0.0
    if log_fall >= log(large / small):
        return inf
    examples = (exp(log_fall) - 1) / (1 / small - 1 / large)  # S_min B_crit, in units of S(large)
    return examples / (1 - examples / large)


class Fit(NamedTuple):
    """The curve of a set of runs, or why there is none; and what it says, with intervals over the repeats."""

    curve: Curve | None
    critical: Estimate
    least_steps: Estimate
    misfit: float  # by which factor the curve is off a batch size's own level, at most
    reason: str


def fit(runs: Runs) -> Fit:
    """Fit S(B) = S_min (1 + B_crit / B)."""
    unknown = Estimate(nan, nan, nan)
    curve = fit_curve(runs)
    if curve is None:
        return Fit(None, unknown, unknown, nan, _why_none(runs))
    without = [fit_curve(part) for part in leave_one_out(runs)]
    ends = np.array([curve.log_small, curve.log_large])
    floor = _hidden_in_evaluations(runs, curve)
    fall, slopes = ends[0] - ends[1], np.array([1.0, -1.0])
    margin = _margin([None if c is None else c.log_small - c.log_large for c in without], slopes, floor)
    critical = [critical_of(x, curve.small, curve.large) for x in (fall, fall - margin, fall + margin)]
    least, share = curve.least_steps, curve.small / (curve.large - curve.small)
    slopes = np.array([-share * exp(ends[0]), (1 + share) * exp(ends[1])])
    margin = _margin([None if c is None else c.least_steps for c in without], slopes, floor)
    steps = [max(0.0, x) for x in (least, least - margin, least + margin)]
    levels = fit_levels(runs)[runs.hit_cells]
    off = float(np.abs(levels - np.log(curve.steps(runs.sizes[runs.hit_cells]))).max())
    return Fit(curve, Estimate(*critical), Estimate(*steps), exp(off), "")


def _why_none(runs: Runs) -> str:
    if len(runs.sizes) < 2:
        return "one batch size has no curve"
    if not runs.hit.any():
        return "no run reached the target"
    return f"only runs of batch {runs.sizes[runs.hit_cells[0]]:g} reached the target"


def leave_one_out(runs: Runs) -> list[Runs]:
    """The runs without each of the repeats."""
    return [runs.only(runs.repeat != repeat) for repeat in np.unique(runs.repeat)]


def _margin(without: list[float | None], slopes: np.ndarray, floor: np.ndarray) -> float:
    """By how much the interval of an estimate reaches to either side: NaN with one repeat, infinite where the runs
    without some repeat allow no estimate.

    Args:
        without: the estimates without each repeat.
        slopes: derivatives of the estimate by the ends of the curve.
        floor: covariance of these ends, from what can hide between evaluations.
    """
    n = len(without)
    if n < 2:
        return nan
    known = [x for x in without if x is not None]
    if len(known) < n:
        return inf
    jackknife = (n - 1) / n * float(np.sum((np.array(known) - np.mean(known)) ** 2))
    return t_quantile(n) * sqrt(max(jackknife, float(slopes @ floor @ slopes)))


def _hidden_in_evaluations(runs: Runs, curve: Curve) -> np.ndarray:
    """The covariance of the curve's ends if each batch size's level may lie anywhere between its evaluations."""
    cells = runs.hit_cells
    share = _shares(curve.log_small, curve.log_large, _weight(runs.sizes, curve.small, curve.large))[cells]
    inverse = np.linalg.pinv(share)
    return inverse @ np.diag(runs.unknown_of_cells()[cells] ** 2) @ inverse.T


def fit_curve(runs: Runs) -> Curve | None:
    """The curve of the greatest likelihood; None where runs of fewer than two batch sizes reached the target."""
    if len(runs.hit_cells) < 2:
        return None
    weight = _weight(runs.sizes, runs.sizes[0], runs.sizes[-1])

    def levels(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _log_steps(ends[0], ends[1], weight), _shares(ends[0], ends[1], weight)

    first, last = runs.sizes[0], runs.sizes[-1]
    return Curve(*map(float, (first, last, *_most_likely(runs, levels, _first_guess(runs)[[0, -1]]))))


def _weight(batch_size: np.ndarray, small: float, large: float) -> np.ndarray:
    """S(B) = weight S(small) + (1 - weight) S(large)."""
    return ((1 / batch_size - 1 / large) / (1 / small - 1 / large)).clip(0, 1)


def _log_steps(log_small: float, log_large: float, weight: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.logaddexp(log_small + np.log(weight), log_large + np.log1p(-weight))


def _shares(log_small: float, log_large: float, weight: np.ndarray) -> np.ndarray:
    """Derivatives of `_log_steps` by both ends: batch sizes x 2."""
    share = weight * np.exp(log_small - _log_steps(log_small, log_large, weight))
    return np.stack([share, 1 - share], axis=1)


def fit_levels(runs: Runs) -> np.ndarray:
    """log S of each batch size by itself, of the greatest likelihood; infinite where no run reached the target."""
    logs, reached = np.full(len(runs.sizes), inf), runs.hit_cells
    if len(reached):
        known = runs.only(np.isin(runs.cell, reached))
        known = known._replace(cell=np.searchsorted(reached, known.cell))
        logs[reached] = _most_likely(known, lambda logs: (logs, np.eye(len(logs))), _first_guess(runs)[reached])
    return logs


def _first_guess(runs: Runs) -> np.ndarray:
    """log S of each batch size, roughly: the middle of the intervals, and where a run that missed ended."""
    middle = np.log(((runs.low + np.where(runs.hit, runs.high, runs.low)) / 2).clip(min=1))
    cells = np.unique(runs.cell)  # without a repeat, a batch size may have no run
    return np.interp(range(len(runs.sizes)), cells, [middle[runs.cell == cell].mean() for cell in cells])


def _most_likely(
    runs: Runs, levels: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], first: np.ndarray
) -> np.ndarray:
    """The parameters under which the runs' intervals have the greatest chance.

    Args:
        runs: the runs, of whom some reached the target.
        levels: parameters -> log S of each batch size, and its derivatives (batch sizes x parameters).
        first: the parameters to begin with.
    """
    with np.errstate(divide="ignore"):
        low, high = np.log(runs.low), np.log(runs.high)
    least = max(LEAST_SD, sqrt(float(np.mean(runs.unknown**2))))

    def surprise(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log-likelihood, and its derivatives; the last parameter is the logarithm of the deviation."""
        logs, slopes = levels(parameters[:-1])
        sd = exp(parameters[-1])
        below, above = (low - logs[runs.cell]) / sd, (high - logs[runs.cell]) / sd
        chance = _log_chance(below, above)
        at_low, at_high = (np.exp(-(z**2) / 2 - chance) / sqrt(2 * np.pi) for z in (below, above))
        by_level = (at_high - at_low) / sd
        by_log_sd = np.where(runs.hit, above, 0) * at_high - np.where(np.isfinite(below), below, 0) * at_low
        return -float(chance.sum()), np.append(by_level @ slopes[runs.cell], by_log_sd.sum())

    bounds = [*((level - FAR, level + FAR) for level in first), (log(least), log(MOST_SD))]
    start = np.append(first, log(max(least, 0.2)))
    found = scipy.optimize.minimize(
        surprise, start, jac=True, method="SLSQP", bounds=bounds, options={"ftol": 1e-11, "maxiter": 200}
    )
    return np.asarray(found.x[:-1])


def _log_chance(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """log(Phi(high) - Phi(low)) of the normal distribution, as exact in its tails as in the middle."""
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    upper, lower = scipy.special.log_ndtr(high), scipy.special.log_ndtr(low)
    return upper + np.log(-np.expm1(lower - upper))


def perfect_until(runs: Runs) -> Estimate:
    """The batch size at which steps exceed perfect scaling from the smallest batch, S(B_0) B_0 / B, by 20 %.

    The excess e(B) = log S(B) + log B - log S(B_0) - log B_0 is interpolated linearly in log B between the levels of
    neighbouring batch sizes, and the value is where it first reaches log 1.2: infinite if that is not within the batch
    sizes studied; NaN if it is between one and the next, and no run of the latter reached the target, or if no run of
    the smallest batch did. The interval is of those B at which the t interval of e(B) does not tell whether it has come
    to log 1.2 (after Fieller); it ends at infinity where that may be beyond the batch sizes studied.
    """
    sizes, few = runs.sizes, _hit_once_or_never(runs)
    if len(sizes) < 2 or 0 not in runs.hit_cells:
        return Estimate(nan, nan, nan)
    at = np.unique(np.concatenate([np.geomspace(*pair, BETWEEN + 1) for pair in pairwise(sizes)]))
    weights = np.array([np.interp(np.log(at), np.log(sizes), one) for one in np.eye(len(sizes))]).T
    perfect = np.log(sizes[0] / at)

    def excess(part: Runs) -> np.ndarray:
        levels = fit_levels(part)
        known = weights @ np.where(np.isfinite(levels), levels, 0) - levels[0] - perfect
        return np.where((weights[:, np.isinf(levels)] > 0).any(axis=1), inf, known)

    def margin(part: Runs) -> np.ndarray:
        without = np.array([excess(others) for others in leave_one_out(part)])
        with np.errstate(invalid="ignore"):  # of infinities: a batch size that one repeat alone has
            spread = (n - 1) / n * np.square(without - without.mean(axis=0)).sum(axis=0)
        contrast = np.square(weights - np.eye(len(sizes))[0])
        hidden = contrast @ part.unknown_of_cells() ** 2
        return t_quantile(n) * np.sqrt(np.maximum(np.nan_to_num(spread, nan=inf), hidden))

    middle, n = excess(runs), len(np.unique(runs.repeat))
    value = _first(at, middle)
    value = nan if np.isinf(middle[at > value][:1]).any() else value
    if n < 2 or 0 in few:
        return Estimate(value, nan, nan)
    # The level of a batch size at which one run arrives, or none, is at least what its runs have been trained for.
    missed = np.isin(runs.cell, few) & ~runs.hit
    ended = runs._replace(high=np.where(missed, runs.low, runs.high), low=np.where(missed, 0.99 * runs.low, runs.low))
    width = margin(ended)
    at_most = np.where((weights[:, few] > 0).any(axis=1), inf, middle + width)
    return Estimate(value, min(_first(at, at_most), float(sizes[-1])), _first(at, excess(ended) - width))


def _hit_once_or_never(runs: Runs) -> list[int]:
    """Indices of the batch sizes at which fewer than two repeats reached the target."""
    cells = range(len(runs.sizes))
    return [cell for cell in cells if len(np.unique(runs.repeat[runs.hit & (runs.cell == cell)])) < 2]


def _first(at: np.ndarray, excess: np.ndarray) -> float:
    """Where the excess first reaches log 1.2; infinite if nowhere, and the last place before it becomes infinite."""
    over = np.flatnonzero(excess >= log(EXCESS))
    if not len(over):
        return inf
    last = over[0]
    if last == 0:
        return float(at[0])
    share = (log(EXCESS) - excess[last - 1]) / (excess[last] - excess[last - 1])
    return float(at[last - 1] * (at[last] / at[last - 1]) ** share)
