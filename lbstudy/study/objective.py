"""By which number the trials of a study are compared: a metric after the last epoch, or the time to a target.

A trial that is tuned for a target ends when it has met it: a *hit*, with a time in steps, epochs or seconds. One that
uses up its budget before is a *miss*: its time is censored, and all that is known is how near it came. The objective
puts the trials in one order, in finite numbers that the search and the pruner minimise:

    a hit            log10 of its time, at most MISSED; ratios of times are what counts
    a miss           MISSED + its relative distance from the target, in (MISSED, MISSED + 1]
    a diverged one   MISSED + 2

A trial that runs has the number of a miss, by the nearest it has come so far. So numbers only fall while it trains,
every hit is ahead of all that still run, and these are compared at a rung by how near they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, log10
from typing import Any

from lbstudy.study.spec import Tuning

WORST_LOSS = 100.0
MISSED = 9.0
"""log10 of a time that no trial has: a billion steps or epochs, 31 years."""

TIMES = {"steps_to_target": "step", "epochs_to_target": "epoch", "seconds_to_target": "run_seconds"}
"""Metric -> what of a report is a trial's time so far, in its unit."""


def objective(tuning: Tuning, report: Mapping[str, Any], outcome: str | None) -> float:
    """The value that is searched for.

    Args:
        tuning: of the study; its target is known.
        report: of the trial's last epoch.
        outcome: how the trial ended, if it has.
    """
    if outcome == "diverged":
        return worst(tuning)
    if tuning.goal is None:
        return min(report[tuning.metric], WORST_LOSS)
    time = report.get(tuning.metric)
    if time is None:
        return MISSED + tuning.goal.shortfall(report.get("nearest"))
    return min(log10(time), MISSED)


def sort_key(tuning: Tuning, metrics: Mapping[Any, Any]) -> float:
    """What puts completed trials in their order, the best one first.

    Args:
        tuning: of the study.
        metrics: of the trial's last epoch; a time that is missing, None, NaN or infinite was not reached.
    """
    if tuning.goal is not None:
        wanted = {name: metrics.get(name) for name in (tuning.metric, "nearest")}
        return objective(tuning, {n: v for n, v in wanted.items() if v is not None and isfinite(v)}, None)
    return -metrics[tuning.metric] if tuning.direction == "maximize" else metrics[tuning.metric]


def worst(tuning: Tuning) -> float:
    """The objective of a trial that diverged, behind all others'."""
    if tuning.goal is not None:
        return MISSED + 2
    return 0.0 if tuning.metric == "val_accuracy" else WORST_LOSS


def time_so_far(tuning: Tuning, report: Mapping[str, Any]) -> float | None:
    """log10 of how long a trial has trained, in the unit of its study's target; None where it has none."""
    return log10(report[TIMES[tuning.metric]]) if tuning.goal else None
