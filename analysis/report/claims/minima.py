"""Whether smoothed minima are wider."""

from __future__ import annotations

from math import exp, inf, isnan, nan

import numpy as np
import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report import power
from lbstudy.analysis.report.claims.verdicts import Claim, Comparison, Verdict, decide, judged
from lbstudy.analysis.report.sentences import count, ratio_words
from lbstudy.analysis.tables.best import failed_runs
from lbstudy.analysis.tables.minima import MEASURES
from lbstudy.study.spec import StudySpec

DECISIVE = ("eigenvalue_1", "width_1")
"""The measures (of `tables.minima.MEASURES`) that decide about minima: one of curvature, one of width."""


def wider_minima(study: StudySpec, runs: pd.DataFrame) -> Claim:
    """Smoothed minima are wider. `runs`: `minima_table.runs`."""
    # where most valleys go on beyond the line there is a lower bound of the width, which decides nothing
    runs = runs.assign(width_1=runs["width_1"].mask(runs["beyond"] >= 0.5, inf))
    present = [name for name in DECISIVE if runs[name].notna().any()]
    comparisons = []
    for optimizer in dict.fromkeys(cell.optimizer for cell in study.list_cells()):
        batch = max(cell.batch_size for cell in study.list_cells() if cell.optimizer == optimizer)
        here = runs[(runs["optimizer"] == optimizer) & (runs["batch_size"] == batch)]
        smoothings = [c.smoothing for c in study.list_cells() if (c.optimizer, c.batch_size) == (optimizer, batch)]
        if "none" in smoothings and present:
            comparisons += [_minima(study, optimizer, batch, s, here, present) for s in smoothings if s != "none"]
    if not comparisons:
        why = "There is no smoothed cell beside a plain one" if present else "No minimum has been measured"
        comparisons = [Comparison("cannot tell", f"{why}.")]
    return Claim(
        "minima",
        "Smoothed minima are wider (flatter).",
        "The smoothed minimum over the plain one at the largest batch size, paired by seed; 95 % interval of the ratio "
        "against 1. Every measure that was taken must agree: "
        + "; ".join(f"{MEASURES[name].label}, large means {MEASURES[name].large_is}" for name in DECISIVE)
        + ".",
        comparisons,
        "Large positive eigenvalues mean a sharp minimum (Keskar et al. 2017). Naganuma and Yokota’s slides (2019) "
        "have the two words swapped and call such a minimum flat; here the words are Keskar’s. Eigenvalues change when "
        "weights are rescaled though the function stays the same; widths along filter-normalised directions do not. On "
        "the line between two solutions the sharper side flips with weight decay (Li et al. 2018): it decides nothing.",
        "sharpness",
    )


def _minima(
    study: StudySpec, optimizer: str, batch: int, smoothing: str, runs: pd.DataFrame, present: list[str]
) -> Comparison:
    plain, smoothed = (runs[runs["smoothing"] == s].set_index("repeat") for s in ("none", smoothing))
    if failed := failed_runs(plain["test_accuracy"]) + failed_runs(smoothed["test_accuracy"]):
        who = f"{study.label(optimizer)} at batch {batch} with {study.label(smoothing)} or without"
        sentence = f"{who}: {failed} of the runs hardly learnt, and such lie flat anyway."
        return Comparison("cannot tell", sentence, power.FAILING)
    parts, verdicts, ratios = [], set(), []
    for name in present:
        measure, ratio = MEASURES[name], _ratio(smoothed[name].astype(float), plain[name].astype(float))
        above: Verdict = "supported" if measure.large_is == "flat" else "contradicted"
        verdicts.add(decide(ratio.low, ratio.high, 1, above=above))
        ratios.append((power.in_logarithms(ratio), above))
        known = "not measured in both" if not ratio.n else "not finite and positive in every run"
        if name == "width_1" and ratio.n and inf in {*plain[name], *smoothed[name]}:
            known = "not known, since some valley goes on beyond the line"
        words = f"{ratio_words(ratio)} that without smoothing ({count(ratio.n)})" if not isnan(ratio.value) else known
        parts.append(f"{measure.label} {words}")
    sentence = f"{study.label(optimizer)} at batch {batch} with {study.label(smoothing)}: {'; '.join(parts)}."
    sides = {(ratio.value > 0) == (above == "supported") for ratio, above in ratios}
    need = (
        power.sentence([ratio for ratio, _ in ratios], 0) if len(sides) == 1 else power.OPPOSED.format("the measures")
    )
    need = "" if any(isnan(ratio.value) for ratio, _ in ratios) else need
    return judged(verdicts.pop() if len(verdicts) == 1 else "cannot tell", sentence, need)


def _ratio(first: pd.Series, second: pd.Series) -> stats.Mean:
    """The geometric mean of the ratio of two measures with its interval, paired by repeat.

    NaN where any of them has no logarithm: leaving out those that are not positive or not finite would be a choice.
    """
    first, second = first.dropna().align(second.dropna(), join="inner")
    if not all((values > 0).all() and np.isfinite(values).all() for values in (first, second)):
        return stats.Mean(nan, nan, len(first), nan, nan)
    mean = stats.paired_difference(np.log(first), np.log(second))
    return mean._replace(value=exp(mean.value), low=exp(mean.low), high=exp(mean.high))
