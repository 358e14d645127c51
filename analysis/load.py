"""Records as tidy tables: a row per trial or confirmed run, a row per epoch."""

from __future__ import annotations

import pandas as pd

from lbstudy.records import StudyFolder, TrialRecord, ranked

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]
CONFIRMED_METRICS = [
    *METRICS, "clean_train_loss", "clean_train_accuracy", "test_loss", "test_accuracy",
]  # fmt: skip
KEY = ["cell", "optimizer", "batch_size", "smoothing", "number"]
CONFIRMED_KEY = [*KEY, "trial", "repeat", "rank", "published"]
OUTCOME = ["status", "epochs"]


def trials(folder: StudyFolder) -> pd.DataFrame:
    """One row per trial: its cell, tuned values (as `params.NAME`), status, and the metrics of its last epoch."""
    rows = [_key(record) | {"published": record.published} | _outcome(record, METRICS) for record in folder.trials()]
    return _frame(rows, [*KEY, "published", *OUTCOME, *METRICS, "seconds"], METRICS)


def epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every trial: its cell and number, and all metrics reported."""
    return pd.DataFrame([_key(record) | report for record in folder.trials() for report in folder.epochs(record)])


def confirmed(folder: StudyFolder) -> pd.DataFrame:
    """One row per confirmed run.

    `trial` is the tuning trial whose configuration it repeats and `rank` that trial's rank in its cell now, 0 for the
    best, missing where it has not completed. `repeat` numbers the seeds, which are the same in every cell. Test and
    clean training metrics are those after the last epoch.
    """
    rows = [key | _outcome(run, CONFIRMED_METRICS) for run, key in _confirmed_runs(folder)]
    return _frame(rows, [*CONFIRMED_KEY, *OUTCOME, *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)


def confirmed_epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every confirmed run; see `confirmed`."""
    where = folder.confirmation
    rows = [key | entry for run, key in _confirmed_runs(folder) for entry in where.epochs(run)]
    return _frame(rows, [*CONFIRMED_KEY, "epoch", *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)


def _confirmed_runs(folder: StudyFolder) -> list[tuple[TrialRecord, dict[str, object]]]:
    """The runs, each with the columns that say which it is."""
    study, tuned = folder.study(), folder.trials()
    ranks = {
        (cell.name, trial.number): rank
        for cell in study.list_cells()
        for rank, trial in enumerate(ranked((t for t in tuned if t.cell == cell.name), study))
    }
    return [
        (
            run,
            _key(run)
            | {"trial": run.trial, "repeat": run.repeat, "rank": ranks.get((run.cell, run.trial or 0))}
            | {"published": run.published},
        )
        for run in folder.confirmation.trials()
    ]


def _key(record: TrialRecord) -> dict[str, object]:
    return {
        "cell": record.cell,
        "optimizer": record.optimizer,
        "batch_size": record.batch_size,
        "smoothing": record.smoothing,
        "number": record.number,
    }


def _outcome(record: TrialRecord, metrics: list[str]) -> dict[str, object]:
    return (
        {"status": record.status, "epochs": record.epochs}
        | {metric: record.metrics.get(metric) for metric in metrics}
        | {"seconds": record.seconds, "started": record.started, "device": record.device, "seed": record.seed}
        | {f"params.{name}": value for name, value in record.params.items()}
    )


def _frame(rows: list[dict[str, object]], columns: list[str], numbers: list[str]) -> pd.DataFrame:
    """The rows as a frame with the types that its columns have; it has the columns even where there is no row."""
    frame = pd.DataFrame(rows, columns=None if rows else columns).astype(dict.fromkeys(numbers, float))
    return frame.astype({"rank": "Int64"}) if "rank" in frame else frame
