"""Records as tidy tables: a row per trial or confirmed run, a row per epoch."""

from __future__ import annotations

import pandas as pd

from lbstudy.records import StudyFolder, TrialRecord
from lbstudy.study import StudySpec

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]
CONFIRMED_METRICS = [
    *METRICS, "clean_train_loss", "clean_train_accuracy", "test_loss", "test_accuracy", "learning_rate",
    "gradient_norm", "fallbacks", "images_per_second",
]  # fmt: skip
RUN_COLUMNS = ["cell", "optimizer", "batch_size", "smoothing", "number", "trial", "repeat", "rank", "published"]


def trials(folder: StudyFolder) -> pd.DataFrame:
    """One row per trial: its cell, tuned values (as `params.NAME`), status, and the metrics of its last epoch."""
    records = folder.trials()
    columns = [*_key(TrialRecord("", 0, "", 0, "", {}, 0, {})), "status", "published", "epochs", *METRICS, "seconds"]
    frame = pd.DataFrame(
        [
            _key(record)
            | {"status": record.status, "published": record.published, "epochs": record.epochs}
            | {metric: record.metrics.get(metric) for metric in METRICS}
            | {"seconds": record.seconds, "started": record.started, "device": record.device, "seed": record.seed}
            | {f"params.{name}": value for name, value in record.params.items()}
            for record in records
        ],
        columns=None if records else columns,
    )
    return frame.astype(dict.fromkeys(METRICS, float))


def epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every trial: its cell and number, and all metrics reported."""
    return pd.DataFrame([_key(record) | report for record in folder.trials() for report in folder.epochs(record)])


def ranked(study: StudySpec, trials: pd.DataFrame) -> pd.DataFrame:
    """The completed trials, best first by the study's metric after the last epoch, with their `rank` in their cell.

    Pruned trials are left out: they have not had the budget that the comparison is about.
    """
    ascending = study.tuning.direction == "minimize"
    completed = trials[trials["status"] == "completed"]
    best_first = completed.sort_values([study.tuning.metric, "number"], ascending=[ascending, True], kind="stable")
    return best_first.assign(rank=best_first.groupby("cell", sort=False).cumcount())


def confirmed(folder: StudyFolder, tuned: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per confirmed run: whose configuration it repeats, how it ended, and the metrics of its last epoch.

    `rank` counts the completed trials of the cell, 0 the best; it is NA if the trial is not among them any more.
    `tuned` are the study's trials, if they have been loaded already.
    """
    rows = [
        key
        | {"train_on": record.run.get("train_on"), "status": record.status, "epochs": record.epochs}
        | {metric: record.metrics.get(metric) for metric in CONFIRMED_METRICS}
        | {"seconds": record.seconds, "started": record.started, "device": record.device, "seed": record.seed}
        | {f"params.{name}": value for name, value in record.params.items()}
        for record, key in _confirmed_runs(folder, tuned)
    ]
    columns = [*RUN_COLUMNS, "train_on", "status", "epochs", *CONFIRMED_METRICS, "seconds", "started", "device", "seed"]
    return _typed(pd.DataFrame(rows), columns)


def confirmed_epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every confirmed run; `seconds` is the epoch's."""
    rows = [key | report for record, key in _confirmed_runs(folder) for report in folder.confirmation.epochs(record)]
    return _typed(pd.DataFrame(rows), [*RUN_COLUMNS, "epoch", *CONFIRMED_METRICS, "seconds"])


def _confirmed_runs(
    folder: StudyFolder, tuned: pd.DataFrame | None = None
) -> list[tuple[TrialRecord, dict[str, object]]]:
    runs = folder.confirmation.trials()
    if not runs:
        return []
    best_first = ranked(folder.study(), trials(folder) if tuned is None else tuned)
    ranks = best_first.set_index(["cell", "number"])["rank"].to_dict()
    return [
        (
            run,
            _key(run)
            | {"trial": run.trial, "repeat": run.repeat}
            | {"rank": ranks.get((run.cell, run.trial)), "published": run.published},
        )
        for run in runs
    ]


def _typed(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The frame with at least these columns, in this order, whatever the runs have reported."""
    runs = runs.reindex(columns=list(dict.fromkeys([*columns, *runs])))
    return runs.astype({"rank": "Int64", "trial": "Int64", **dict.fromkeys(CONFIRMED_METRICS, float)})


def _key(record: TrialRecord) -> dict[str, object]:
    return {
        "cell": record.cell,
        "optimizer": record.optimizer,
        "batch_size": record.batch_size,
        "smoothing": record.smoothing,
        "number": record.number,
    }
