"""What the configurations from the literature reach, trained with as many seeds as the tuned ones, and beside them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lbstudy.analysis import load, stats
from lbstudy.analysis.tables.best import READINGS, accuracy_by_repeat, winners, with_factors
from lbstudy.records.folder import StudyFolder

SAME = "it is the best one"
CELL: dict[str, Any] = {"optimizer": str, "batch_size": int, "smoothing": str}
FOUND: dict[str, Any] = {
    "val_accuracy": float, "test_accuracy": float, "test_accuracy_low": float, "test_accuracy_high": float, "n": int,
    "tuning_adds": float, "tuning_adds_low": float, "tuning_adds_high": float, "note": str,
}  # fmt: skip


def outdone(confirmed: pd.DataFrame, cell: str) -> tuple[stats.Mean, stats.Mean] | None:
    """By how much a published configuration of a cell beats the one that tuning chose, in test accuracy paired by seed:
    after the last epoch, and at the best ones. None where no interval after the last epoch lies above zero; of several
    the one that leads most, of which chance has its part.

    Args:
        confirmed: `load.confirmed` of the study's folder.
        cell: its name.
    """
    runs = confirmed[(confirmed["cell"] == cell) & (confirmed["status"] == "completed")]
    runs = runs[runs["published"].astype(bool)]
    rivals = runs[~runs.index.isin(winners(runs).index)]
    if rivals.empty:
        return None
    chosen = [accuracy_by_repeat(confirmed, cell, metric) for metric in READINGS]
    leads = []
    for _, found in rivals.groupby("trial"):
        own = found.set_index("repeat")[[*READINGS]].astype(float)
        last, stopped = (stats.paired_difference(own[m].dropna(), c) for m, c in zip(READINGS, chosen, strict=True))
        leads += [(last, stopped)] * bool(last.low > 0)
    return max(leads, key=lambda lead: lead[0].value, default=None)


def published_table(folder: StudyFolder) -> pd.DataFrame:
    """A row per published configuration of which confirmed runs have completed: its values (those that the literature
    leaves open are the sampler's), mean accuracies of its n runs with the 95 % interval of the test accuracy, and what
    tuning adds: the test accuracy of the cell's best configuration minus this one's, paired by seed."""
    folder = load.Snapshot.of(folder)
    study, confirmed = folder.study(), load.confirmed(folder)
    trials = load.trials(folder).set_index(["cell", "number"])
    runs = confirmed[confirmed["published"].astype(bool) & (confirmed["status"] == "completed")]
    tuned, rows = study.tuned(), []
    for cell in study.list_cells():
        for trial, found in runs[runs["cell"] == cell.name].groupby("trial"):
            accuracies = found.set_index("repeat")["test_accuracy"].astype(float)
            mean = stats.mean_accuracy(accuracies)
            row: dict[str, object] = {**cell.values}
            row |= {
                name: trials.at[(cell.name, trial), f"params.{name}"] for name in tuned if name in study.ranges(cell)
            }
            row |= {"val_accuracy": found["val_accuracy"].mean(), "n": mean.n, "test_accuracy": mean.value}
            row |= {"test_accuracy_low": mean.low, "test_accuracy_high": mean.high, "note": SAME}
            if not (found["rank"] == 0).any():
                lead = stats.paired_difference(accuracy_by_repeat(confirmed, cell.name), accuracies)
                row |= {
                    "tuning_adds": lead.value,
                    "tuning_adds_low": lead.low,
                    "tuning_adds_high": lead.high,
                    "note": "",
                }
            rows.append(row)
    types = CELL | dict.fromkeys(tuned, float) | FOUND
    return pd.DataFrame(rows, columns=with_factors(types, study)).astype(types)
