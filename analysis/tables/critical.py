"""Critical batch sizes: how far steps to a target fall with the batch size, of each optimizer and smoothing.

The times are those of the confirmed runs of each cell's best configuration (`targets`), the mathematics is in
`scaling`. Intervals are over seeds: they are about the configurations that tuning has found. How much hangs on which
trials it has happened to make is said apart, by resampling each cell's trials: the best of a resample by the study's
metric reaches the target when its own tuning epochs show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import inf, isfinite, isinf, isnan, nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lbstudy.analysis import load, scaling
from lbstudy.analysis.scaling import Estimate, Runs
from lbstudy.analysis.tables import targets
from lbstudy.analysis.tables.best import with_factors
from lbstudy.analysis.tables.targets import Target
from lbstudy.study.spec import Cell, StudySpec

ESTIMATES = ["b_crit", "s_min", "perfect_until", "b_crit_tuned", "s_min_tuned"]
COLUMNS: dict[str, Any] = {
    "optimizer": object, "smoothing": object, "metric": object, "target": float, "smallest_batch": "Int64",
    "largest_batch": "Int64", "n": "Int64", "runs": "Int64", "reached": "Int64",
    **{f"{name}{end}": float for name in ESTIMATES for end in ("", "_low", "_high")},
    "misfit": float, "note": object,
}  # fmt: skip

RESAMPLES = 400
"""Of each cell's tuning trials."""

BAD_FIT = 1.3
"""A curve that is off some batch size's steps by this factor is said to fit badly."""


class Tuning(NamedTuple):
    """The trials of a study: `load.trials` and `load.epochs`."""

    trials: pd.DataFrame
    epochs: pd.DataFrame


def critical_table(
    study: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame, tuning: Tuning,
    goals: Sequence[Target] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row per optimizer, smoothing and target, and for each combination of further factors.

    `b_crit` and `s_min` are those of S(B) = S_min (1 + B_crit / B), `perfect_until` is the batch size at which steps
    exceed perfect scaling from the smallest one by 20 %, each with its 95 % interval over the `n` seeds. Infinite, or a
    bound that is: not within the batch sizes studied. `b_crit_tuned` and `s_min_tuned` are from the best trials of the
    tuning instead, one of each cell, and their intervals hold 95 % of the resamples of each cell's trials; there are
    none for what trials do not measure, the clean training loss. `misfit` is the factor by which the curve is off the
    steps of some batch size, at most. `note` says what is missing, or lies outside of the batch sizes studied.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        epochs: `load.confirmed_epochs` of its folder.
        tuning: the trials of its folder.
        goals: what to reach; default: `targets.choose_targets` of each variant.
    """
    rows = []
    for part in study.compared():
        for goal in targets.choose_targets(part, confirmed) if goals is None else goals:
            times = targets.winners_times(confirmed, epochs, goal)
            drawn = _times_of_trials(part, tuning, goal)
            for cells in _compared(part):
                rows.append(_row(cells, goal, times, drawn))
    return pd.DataFrame(rows, columns=with_factors(COLUMNS, study)).astype(COLUMNS)


def _compared(part: StudySpec) -> list[list[Cell]]:
    """The cells of a variant that differ in batch size only."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in part.list_cells():
        groups.setdefault((cell.optimizer, cell.smoothing), []).append(cell)
    return list(groups.values())


def _row(cells: list[Cell], goal: Target, times: pd.DataFrame, drawn: pd.DataFrame) -> dict[str, object]:
    names = [cell.name for cell in cells]
    found = times[times["cell"].isin(names)]
    runs, sizes = Runs.of(found), [cell.batch_size for cell in cells]
    row: dict[str, object] = {
        **cells[0].values, "metric": goal.metric, "target": goal.value, "smallest_batch": min(sizes),
        "largest_batch": max(sizes), "n": found["repeat"].nunique(), "runs": len(found),
        "reached": int(runs.hit.sum()),
    }  # fmt: skip
    if isnan(goal.value):
        return row | {"reached": None, "note": "no target: no run of the baseline has completed with this metric"}
    if found.empty:
        return row | {"note": "no confirmed run has ended"}
    fit, perfect_until = scaling.fit(runs), scaling.perfect_until(runs)
    tuned = resample_trials(drawn[drawn["cell"].isin(names)])
    for name, estimate in zip(ESTIMATES, (fit.critical, fit.least_steps, perfect_until, *tuned), strict=True):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    return row | {"misfit": fit.misfit, "note": "; ".join(_notes(runs, fit, perfect_until))}


def _notes(runs: Runs, fit: scaling.Fit, perfect_until: Estimate) -> list[str]:
    smallest, largest, seeds = runs.sizes[0], runs.sizes[-1], len(np.unique(runs.repeat))
    notes = [fit.reason] if fit.reason else []
    if missed := int((~runs.hit).sum()):
        notes.append(f"{missed} of {len(runs.hit)} runs never reached it, and count as later than they ended")
    if at_first := int((runs.low[runs.hit] == 0).sum()):
        notes.append(f"{at_first} of {len(runs.hit)} runs had reached it when they were first evaluated")
    if fit.critical.value > largest:
        notes.append(f"B_crit is above the batch sizes studied (largest {largest:g})")
    elif fit.critical.value < smallest:
        notes.append(f"B_crit is below the batch sizes studied (smallest {smallest:g})")
    if isinf(perfect_until.value):
        notes.append(f"within 20 % of perfect scaling up to the largest batch, {largest:g}")
    elif isnan(perfect_until.value) and len(runs.sizes) > 1:
        why = "of the two smallest batches one has no run that reached it"
        notes.append(f"where perfect scaling ends is not known: {why}")
    if seeds == 1:
        notes.append("one seed has no interval")
    if fit.curve and len(runs.hit_cells) == 2:
        notes.append("two batch sizes cannot show whether the curve has that form")
    if fit.misfit > BAD_FIT:
        notes.append(f"the curve is off by a factor of {fit.misfit:.2g} at some batch size")
    return notes


def _times_of_trials(study: StudySpec, tuning: Tuning, goal: Target) -> pd.DataFrame:
    """When the trials of a study reached a target: a row per ended trial with its `rank` in its cell, best first;
    infinite for those that have not completed and so cannot be the best."""
    ended = tuning.trials[tuning.trials["status"].isin(["completed", "pruned", "diverged"])]
    columns = ["cell", "batch_size", "number", "rank", "steps_low", "steps"]
    if goal.metric not in tuning.epochs or ended.empty:
        return pd.DataFrame(columns=columns)
    times = targets.times_to_target(tuning.epochs.assign(repeat=0, rank=0), goal).drop(columns="rank")
    ranks = load.ranked(study, ended)[["cell", "number", "rank"]]
    found = ended[["cell", "number"]].merge(times).merge(ranks, "left")
    return found.assign(rank=found["rank"].astype(float).fillna(inf))[columns].sort_values("rank")


def resample_trials(drawn: pd.DataFrame) -> tuple[Estimate, Estimate]:
    """B_crit and S_min from the best trial of each cell, and what 95 % of the resamples of its trials lie between.

    Args:
        drawn: a row per trial, best first: cell, batch_size, rank (infinite: not completed), steps_low and steps.
    """
    unknown = Estimate(nan, nan, nan)
    if drawn.empty:
        return unknown, unknown
    random, runs, ranks = np.random.default_rng(0), Runs.of(drawn.assign(repeat=0)), drawn["rank"].to_numpy(float)
    trials = [np.flatnonzero(runs.cell == cell) for cell in range(len(runs.sizes))]
    # Of trials sorted by rank, the best of a resample is the first that it holds.
    best = [of_cell[random.integers(len(of_cell), size=(RESAMPLES, len(of_cell))).min(axis=1)] for of_cell in trials]

    @cache
    def curve(*places: int) -> scaling.Curve | None:
        return scaling.fit_curve(runs.only(np.array([place for place in places if isfinite(ranks[place])], int)))

    first = curve(*(of_cell[0] for of_cell in trials))
    curves = [curve(*places) for places in zip(*best, strict=True)]
    known = [c for c in curves if c is not None]
    if first is None or len(known) < RESAMPLES / 2:
        return unknown, unknown

    def between(value: float, values: list[float]) -> Estimate:
        low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")  # some may be infinite
        return Estimate(value, float(low), float(high))

    return (
        between(first.critical, [c.critical for c in known]),
        between(max(0.0, first.least_steps), [max(0.0, c.least_steps) for c in known]),
    )
