"""Records as tidy tables: a row per trial, a row per epoch."""

from __future__ import annotations

import pandas as pd

from lbstudy.records import StudyFolder, TrialRecord

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]


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


def _key(record: TrialRecord) -> dict[str, object]:
    return {
        "cell": record.cell,
        "optimizer": record.optimizer,
        "batch_size": record.batch_size,
        "smoothing": record.smoothing,
        "number": record.number,
    }
