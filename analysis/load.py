"""Records as tidy tables: a row per trial or confirmed run, a row per epoch."""

from __future__ import annotations

from collections import defaultdict

import pandas as pd

from lbstudy.records import StudyFolder, TrialRecord, ranked

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


def confirmed(folder: StudyFolder) -> pd.DataFrame:
    """One row per confirmed run: whose configuration it repeats, how it ended, and the metrics of its last epoch.

    `rank` counts the completed trials of the cell, 0 the best; it is NA if the trial is not among them any more.
    """
    rows = [
        key
        | {"train_on": record.run.get("train_on"), "status": record.status, "epochs": record.epochs}
        | {metric: record.metrics.get(metric) for metric in CONFIRMED_METRICS}
        | {"seconds": record.seconds, "started": record.started, "device": record.device, "seed": record.seed}
        | {f"params.{name}": value for name, value in record.params.items()}
        for record, key in _confirmed_runs(folder)
    ]
    columns = [*RUN_COLUMNS, "train_on", "status", "epochs", *CONFIRMED_METRICS, "seconds", "started", "device", "seed"]
    return _typed(pd.DataFrame(rows), columns)


def confirmed_epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every confirmed run; `seconds` is the epoch's."""
    rows = [key | report for record, key in _confirmed_runs(folder) for report in folder.confirmation.epochs(record)]
    return _typed(pd.DataFrame(rows), [*RUN_COLUMNS, "epoch", *CONFIRMED_METRICS, "seconds"])


def _confirmed_runs(folder: StudyFolder) -> list[tuple[TrialRecord, dict[str, object]]]:
    runs = folder.confirmation.trials()
    if not runs:
        return []
    study, of_cell = folder.study(), defaultdict(list)
    for trial in folder.trials():
        of_cell[trial.cell].append(trial)
    ranks: dict[tuple[str, int | None], int] = {
        (cell, trial.number): rank for cell in of_cell for rank, trial in enumerate(ranked(of_cell[cell], study))
    }
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
