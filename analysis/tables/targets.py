"""Steps, epochs and seconds to a target, against batch size: how a larger batch pays (Shallue et al., JMLR 2019).

A run has reached a target at the first evaluation that meets it, so times are known to one epoch, or to so many steps
as a study is evaluated every: `speed_ratio` compares cells within that. A run that never does has taken infinitely
long: it counts in the median and is not dropped. Only confirmed runs of each cell's best configuration count; they go
on past a target.

A study that was tuned for a target has that one. Else the targets come from a cell's runs unless given: the baseline
cell, which is the smallest batch of SGD (else of the study's first optimizer) without smoothing. They are what
the worst of its runs ends with, so every baseline run reaches them, and the other cells are measured by what plain
small-batch training is sure to deliver. Under a decaying learning rate the time to where a run ends says mostly which
cell ends lower; `halfway_targets` are what the worst run had when half of its epochs were over.
"""

from __future__ import annotations

from itertools import product
from math import exp, inf, isnan, nan, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from lbstudy.analysis import load, stats
from lbstudy.analysis.tables.best import winners, with_factors
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Cell, StudySpec

COLUMNS: dict[str, Any] = {
    "optimizer": object, "batch_size": "Int64", "smoothing": object, "metric": object, "target": float, "n": "Int64",
    "reached": "Int64", "steps": float, "epochs": float, "seconds": float, "note": object,
}  # fmt: skip

TIMES = ["steps", "epochs", "seconds"]
ENDED = ["completed", "diverged"]
LOWS = {"steps_low": "step", "epochs_low": "epochs"}
"""Columns with the last time at which a target was not yet met, and what counts it."""


class Target(NamedTuple):
    """A value to reach: of `clean_train_loss` or `val_loss` from above, of `val_accuracy` (a fraction) from below. NaN:
    unknown."""

    metric: str
    value: float
    stage: Literal["", "half", "end", "tuned"] = ""
    """Which part of another cell's runs it was taken from; or that it is what the study was tuned for."""

    def __str__(self) -> str:
        words = {
            "clean_train_loss": "training loss",
            "val_loss": "validation loss",
            "val_accuracy": "validation accuracy",
        }
        return f"{words[self.metric]} {self.value:.3g}"

    @property
    def options(self) -> list[str]:
        """What asks `lbstudy table STUDY targets` for it."""
        if self.stage == "tuned":
            return []
        return ["--loss" if self.metric == "clean_train_loss" else "--accuracy", repr(self.value)]

    def is_met(self, values: pd.Series) -> pd.Series:
        """Which of the values meet it; NaN never does."""
        return values >= self.value if self.metric == "val_accuracy" else values <= self.value


def baseline(study: StudySpec) -> Cell:
    """The cell that sets the targets of a variant: smallest batch; SGD and no smoothing where the study has them."""
    order = ["sgd", *study.cells.optimizer]
    return min(
        study.list_cells(),
        key=lambda cell: (order.index(cell.optimizer), cell.smoothing != "none", cell.batch_size),
    )


def resolution(study: StudySpec) -> str:
    """How exactly times to a target are known, in words."""
    return f"{study.evaluate_every} steps" if study.evaluate_every else "one epoch"


def tuned_target(study: StudySpec) -> Target | None:
    """The target that a study was tuned for, if it was for any."""
    goal = study.tuning.goal
    return Target(goal.measured, goal.value, "tuned") if goal else None


def choose_targets(
    study: StudySpec, confirmed: pd.DataFrame, loss: float | None = None, accuracy: float | None = None,
    cell: Cell | None = None,
) -> list[Target]:  # fmt: skip
    """A target of training loss and one of validation accuracy: as given, else from a cell, by default the baseline. Of
    a study that was tuned for a target: that one, unless others are given.

    Raises:
        StudyError: a target that no run could reach, or every run.
    """
    if loss is not None and not 0 < loss < inf:
        raise StudyError(f"the target loss must be a positive number, but got {loss:g}")
    if accuracy is not None and not 0 < accuracy <= 1:
        raise StudyError(f"the target accuracy must be a fraction above 0 and at most 1, but got {accuracy:g}")
    if (tuned := tuned_target(study)) and cell is None and loss is None and accuracy is None:
        return [tuned]
    runs = winners(confirmed)
    runs = runs[(runs["cell"] == (cell or baseline(study)).name) & (runs["status"] == "completed")]
    worst_loss, worst_accuracy = _worst(runs, "end" if cell else "")
    return [
        worst_loss if loss is None else Target("clean_train_loss", loss),
        worst_accuracy if accuracy is None else Target("val_accuracy", accuracy),
    ]


def halfway_targets(confirmed: pd.DataFrame, epochs: pd.DataFrame, cell: Cell) -> list[Target]:
    """A target of training loss and one of validation accuracy: what a cell's worst run had after half of its epochs.

    Args:
        confirmed: `load.confirmed`.
        epochs: `load.confirmed_epochs`.
        cell: the cell.
    """
    runs = winners(confirmed)
    runs = runs.loc[(runs["cell"] == cell.name) & (runs["status"] == "completed"), ["cell", "number"]]
    series = epochs.merge(runs)
    last = series.groupby("number")["epoch"].transform("max")
    return _worst(series[series["epoch"] == (last + 1) // 2], "half")


def _worst(rows: pd.DataFrame, stage: Literal["half", "end", ""]) -> list[Target]:
    return [
        Target("clean_train_loss", float(rows["clean_train_loss"].max()), stage),
        Target("val_accuracy", float(rows["val_accuracy"].min()), stage),
    ]


def times_to_target(epochs: pd.DataFrame, target: Target) -> pd.DataFrame:
    """A row per run of `load.confirmed_epochs`: `steps`, `epochs` and `seconds` until it met the target, else infinite.

    `seconds` are those of the run so far, training and evaluation. `steps_low` is the last evaluated step at which the
    target was not yet met, so that the true time lies in (steps_low, steps]: 0 where the first evaluation met it, the
    last step of the run where none did. So for `epochs_low`. Evaluations within epochs count where they have measured
    the target's metric; `epochs` then counts a part of one by its steps.
    """
    run = ["cell", "number"]
    series = load.evaluations(epochs, target.metric)
    lows = {name: series.groupby(run)[count] for name, count in LOWS.items()}
    series = series.assign(steps=series["step"], **{n: counts.shift(fill_value=0) for n, counts in lows.items()})
    first = series[target.is_met(series[target.metric])].groupby(run)[[*TIMES, *LOWS]].first().astype(float)
    keys = ["cell", "optimizer", "batch_size", "smoothing", "number", "repeat", "rank"]
    last = {f"last_{name}": counts.transform("max") for name, counts in lows.items()}
    runs = series[keys].assign(**last).drop_duplicates(run).merge(first, "left", left_on=run, right_index=True)
    runs = runs.fillna(dict.fromkeys(TIMES, inf))
    return runs.assign(**{name: runs[name].fillna(runs[f"last_{name}"]) for name in LOWS}).drop(columns=[*last])


def winners_times(confirmed: pd.DataFrame, epochs: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The times of the runs that count: those of each cell's best configuration that completed or diverged."""
    runs = winners(confirmed)
    ended = runs.loc[
        runs["status"].isin(ENDED),
        ["cell", "optimizer", "batch_size", "smoothing", "number", "repeat"],
    ]
    times = times_to_target(epochs, target)[["cell", "number", *TIMES, *LOWS]]
    return ended.merge(times)  # runs whose epochs are damaged have no times


def speed_ratio(
    first: pd.Series, second: pd.Series, first_low: pd.Series | None = None, second_low: pd.Series | None = None
) -> stats.Mean:
    """The geometric mean of the ratio of two cells' times in epochs, paired by repeat, with its 95 % interval.

    A time T lies anywhere in (L, T], where L is the last time at which the target was not yet met: T - 1 where runs are
    evaluated at the ends of epochs. So the ratio of a pair is at most T1 / L2 and at least L1 / T2, and the interval
    goes from the lower end of the t interval of the latter's logarithms to the upper end of the former's. The standard
    deviation is at least that of times that lie evenly in between, (T - L) / (sqrt(12) T) each on the logarithmic
    scale: where all pairs are equal as far as is known, their spread is not known to be zero.

    Args:
        first, second: epochs until the target, finite, indexed by repeat.
        first_low, second_low: their L; default: an epoch less.
    """
    first, second = first.dropna().align(second.dropna(), join="inner")
    a, b, n = first.to_numpy(float), second.to_numpy(float), len(first)
    if n < 2:
        return stats.Mean(a[0] / b[0] if n else nan, nan, n, nan, nan)
    low_a, low_b = (
        times.to_numpy(float) - 1 if low is None else low.reindex(times.index).to_numpy(float)
        for times, low in ((first, first_low), (second, second_low))
    )
    with np.errstate(divide="ignore"):  # at the first evaluation there is no least time
        logs, most, least = np.log(a / b), np.log(a) - np.log(low_b), np.log(low_a) - np.log(b)
    within = sqrt(float(np.mean((a - low_a) ** 2 / a**2 + (b - low_b) ** 2 / b**2)) / 12)
    sd = max(float(logs.std(ddof=1)), within)

    def end(bounds: np.ndarray, side: int) -> float:
        if not np.isfinite(bounds).all():
            return side * inf
        return float(bounds.mean()) + side * stats.t_quantile(n) * max(float(bounds.std(ddof=1)), within) / sqrt(n)

    return stats.Mean(exp(logs.mean()), sd, n, exp(end(least, -1)), exp(end(most, 1)))


def targets_table(
    study: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame, targets: list[Target] | None = None
) -> pd.DataFrame:
    """A row per cell and target: the median time over the runs that ended, and how many of them `reached` it. Each
    variant of the study has a baseline of its own, and so targets of its own; one that splits gaps has those of the
    gaps.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        epochs: `load.confirmed_epochs` of its folder.
        targets: what to reach; default: `choose_targets`.
    """
    if len(variants := study.variants()) > 1:
        own = [targets or choose_targets(study.whole(part), confirmed) for part in variants]
        parts = [targets_table(part, confirmed, epochs, goals) for part, goals in zip(variants, own, strict=True)]
        return pd.concat(parts, ignore_index=True)
    targets = choose_targets(study, confirmed) if targets is None else targets
    runs = winners(confirmed)
    times = {target: winners_times(confirmed, epochs, target) for target in targets}
    rows = []
    for cell, target in product(study.list_cells(), targets):
        found = times[target].loc[times[target]["cell"] == cell.name, TIMES]
        known = len(found) > 0 and not isnan(target.value)
        row: dict[str, object] = {
            **cell.values, "metric": target.metric, "target": target.value, "n": len(found),
            "reached": int((found["steps"] < inf).sum()) if known else None,
        }  # fmt: skip
        row |= {name: found[name].median() if known else nan for name in TIMES}
        of_cell = runs[runs["cell"] == cell.name]
        notes = _notes(study, of_cell, len(found), target)
        if len(found) and of_cell.loc[of_cell["status"].isin(ENDED), "device"].nunique() > 1:
            row["seconds"] = nan  # a CPU and a GPU have no median
            notes.append("no seconds, for its runs ran on different devices")
        row["note"] = "; ".join(notes)
        rows.append(row)
    return pd.DataFrame(rows, columns=with_factors(COLUMNS, study)).astype(COLUMNS)


def _notes(study: StudySpec, runs: pd.DataFrame, ended: int, target: Target) -> list[str]:
    notes = []
    if isnan(target.value):
        notes.append(f"no target: no confirmed run of {baseline(study).name} has completed with this metric")
    if not ended:
        notes.append("no confirmed run has ended")
    elif len(runs) > ended:
        notes.append(
            f"{len(runs) - ended} of {len(runs)} confirmed runs failed, go on or are damaged, and do not count"
        )
    if diverged := int((runs["status"] == "diverged").sum()):
        notes.append(f"{diverged} of {len(runs)} confirmed runs diverged")
    if target.metric == "val_accuracy" and runs["train_on"].eq("all").any():
        notes.append("the validation samples were trained on")
    return notes
