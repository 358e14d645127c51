"""Steps, epochs and seconds to a target, against batch size: how a larger batch pays (Shallue et al., JMLR 2019).

A run has reached a target at the end of the first epoch that meets it, so times are known to one epoch. A run that
never does has taken infinitely long: it counts in the median and is not dropped. Only confirmed runs of each cell's
best configuration count, and the targets come from one of them unless given: the baseline cell, which is the smallest
batch of SGD (else of the study's first optimizer) without smoothing. They are what the worst of its runs ends with, so
every baseline run reaches them, and the other cells are measured by what plain small-batch training is sure to deliver.
"""

from __future__ import annotations

from itertools import product
from math import inf, isnan, nan
from typing import Any, NamedTuple

import pandas as pd

from analysis.tables import winners
from lbstudy.study import Cell, StudyError, StudySpec

COLUMNS: dict[str, Any] = {
    "optimizer": object, "batch_size": "Int64", "smoothing": object, "metric": object, "target": float, "n": "Int64",
    "reached": "Int64", "steps": float, "epochs": float, "seconds": float, "note": object,
}  # fmt: skip

TIMES = ["steps", "epochs", "seconds"]


class Target(NamedTuple):
    """A value to reach: of `clean_train_loss` from above, of `val_accuracy` (a fraction) from below. NaN: unknown."""

    metric: str
    value: float

    def __str__(self) -> str:
        words = {"clean_train_loss": "training loss", "val_accuracy": "validation accuracy"}
        return f"{words[self.metric]} {self.value:.3g}"

    @property
    def options(self) -> list[str]:
        """What asks `lbstudy table STUDY targets` for it."""
        return ["--loss" if self.metric == "clean_train_loss" else "--accuracy", repr(self.value)]

    def is_met(self, values: pd.Series) -> pd.Series:
        """Which of the values meet it; NaN never does."""
        return values >= self.value if self.metric == "val_accuracy" else values <= self.value


def baseline(study: StudySpec) -> Cell:
    """The cell that sets the targets: smallest batch; SGD and no smoothing where the study has them."""
    order = ["sgd", *study.cells.optimizer]
    return min(
        study.list_cells(),
        key=lambda cell: (order.index(cell.optimizer), cell.smoothing != "none", cell.batch_size),
    )


def choose_targets(
    study: StudySpec, confirmed: pd.DataFrame, loss: float | None = None, accuracy: float | None = None,
    cell: Cell | None = None,
) -> list[Target]:  # fmt: skip
    """A target of training loss and one of validation accuracy: as given, else from a cell, by default the baseline.

    Raises:
        StudyError: a target that no run could reach, or every run.
    """
    if loss is not None and not 0 < loss < inf:
        raise StudyError(f"the target loss must be a positive number, but got {loss:g}")
    if accuracy is not None and not 0 < accuracy <= 1:
        raise StudyError(f"the target accuracy must be a fraction above 0 and at most 1, but got {accuracy:g}")
    runs = winners(confirmed)
    runs = runs[(runs["cell"] == (cell or baseline(study)).name) & (runs["status"] == "completed")]
    return [
        Target("clean_train_loss", float(runs["clean_train_loss"].max()) if loss is None else loss),
        Target("val_accuracy", float(runs["val_accuracy"].min()) if accuracy is None else accuracy),
    ]


def times_to_target(epochs: pd.DataFrame, target: Target) -> pd.DataFrame:
    """A row per run of `load.confirmed_epochs`: `steps`, `epochs` and `seconds` until it met the target, else infinite.

    `seconds` are those of the run so far, training and evaluation.
    """
    run = ["cell", "number"]
    series = epochs.sort_values([*run, "epoch"])
    series = series.assign(
        steps=series["step"], epochs=series["epoch"], seconds=series.groupby(run)["seconds"].cumsum()
    )
    first = series[target.is_met(series[target.metric])].groupby(run)[TIMES].first().astype(float)
    keys = ["cell", "optimizer", "batch_size", "smoothing", "number", "repeat", "rank"]
    runs = series[keys].drop_duplicates(run).merge(first, "left", left_on=run, right_index=True)
    return runs.fillna(dict.fromkeys(TIMES, inf))


def winners_times(confirmed: pd.DataFrame, epochs: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The times of the runs that count: those of each cell's best configuration that completed or diverged."""
    runs = winners(confirmed)
    ended = runs.loc[
        runs["status"].isin(["completed", "diverged"]),
        ["cell", "optimizer", "batch_size", "smoothing", "number", "repeat"],
    ]
    times = times_to_target(epochs, target)[["cell", "number", *TIMES]]
    return ended.merge(times)  # runs whose epochs are damaged have no times


def targets_table(
    study: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame, targets: list[Target] | None = None
) -> pd.DataFrame:
    """A row per cell and target: the median time over the runs that ended, and how many of them `reached` it.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        epochs: `load.confirmed_epochs` of its folder.
        targets: what to reach; default: `choose_targets`.
    """
    targets = choose_targets(study, confirmed) if targets is None else targets
    runs = winners(confirmed)
    times = {target: winners_times(confirmed, epochs, target) for target in targets}
    rows = []
    for cell, target in product(study.list_cells(), targets):
        found = times[target].loc[times[target]["cell"] == cell.name, TIMES]
        known = len(found) > 0 and not isnan(target.value)
        row: dict[str, object] = {
            "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
            "metric": target.metric, "target": target.value, "n": len(found),
            "reached": int((found["steps"] < inf).sum()) if known else None,
        }  # fmt: skip
        row |= {name: found[name].median() if known else nan for name in TIMES}
        row["note"] = _note(study, runs[runs["cell"] == cell.name], len(found), target)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _note(study: StudySpec, runs: pd.DataFrame, ended: int, target: Target) -> str:
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
    return "; ".join(notes)
