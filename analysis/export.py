"""A study's records for other programs: tables as Parquet and CSV, and what each column means.

The tables are those of `load`. In CSV a value that is missing is empty. A time to a target is infinite where the target
was missed.
"""

from __future__ import annotations

from io import BytesIO

import pandas as pd

from lbstudy import storage
from lbstudy.analysis import load
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StoragePath
from lbstudy.study.file import writing
from lbstudy.study.spec import StudySpec

DICTIONARY = "columns.md"

TABLES = {
    "trials": "The trials of the tuning, a row each; metrics are those after the last epoch.",
    "epochs": "Their epochs, a row each.",
    "evaluations": "Their evaluations, those within epochs and those at the ends, a row each.",
    "confirmed": "The confirmed runs, a row each: winners trained again with fresh seeds, and tested.",
    "confirmed_epochs": "The epochs of the confirmed runs, a row each.",
    "confirmed_evaluations": "The evaluations of the confirmed runs, a row each.",
}

COLUMNS = {
    "cell": "name of the cell: a combination of all factors",
    "optimizer": "factor: the optimizer",
    "batch_size": "factor: samples per step, over all workers",
    "smoothing": "factor: the smoothing, several joined by +",
    "number": "number of the trial, or of the confirmed run, within its cell, from 0",
    "published": "whether the configuration is one from the literature",
    "status": "completed, pruned, diverged, failed or running",
    "epochs": "epochs trained; of an evaluation: epochs until then, with their parts",
    "epoch": "number of the epoch, from 1",
    "step": "optimizer steps until then",
    "images": "training images seen until then, repetitions counted",
    "seconds": "seconds of training and validation: of the run; of an epoch; of an evaluation: of the run until then",
    "run_seconds": "seconds of training and validation of the run until then",
    "images_per_second": "training samples through the mini-batch loop, all workers together, without evaluation",
    "started": "when the run began, ISO 8601, UTC",
    "device": "what it was trained on",
    "workers": "data-parallel workers; several numbers where it went on with another one",
    "seed": "of the run: initial weights, order, augmentation, smoothing",
    "val_accuracy": "share of the validation samples classified correctly, 0 to 1",
    "val_loss": "mean cross-entropy on the validation samples, nats",
    "train_loss": "mean training loss of the epoch as it was optimised (mixed, smoothed, under noise), nats",
    "clean_train_loss": "mean cross-entropy on the training images as they are, nats",
    "clean_train_accuracy": "share of the training images, as they are, classified correctly, 0 to 1",
    "test_loss": "mean cross-entropy on the test set, nats",
    "test_accuracy": "share of the test set classified correctly, 0 to 1",
    "best_epoch": "epoch after which the validation metric was best, the first of equals; of runs that completed",
    "test_at_best_epoch": "test_accuracy after that epoch: what early stopping would have reached",
    "learning_rate": "rate of the epoch's last step",
    "gradient_norm": "Euclidean norm of the gradient before clipping, mean over the epoch's steps",
    "fallbacks": "K-FAC: inversions, since the run began, of what was not positive definite at first",
    "nearest": "the best value so far of the metric that the target is about",
    "steps_to_target": "optimizer steps until the target was met; infinite: missed",
    "epochs_to_target": "epochs until the target was met; infinite: missed",
    "seconds_to_target": "seconds until the target was met; infinite: missed",
    "trial": "the tuning trial of the cell whose configuration the run repeats",
    "repeat": "number of the run's seed; runs of one number share the seed, in all cells",
    "rank": "of that trial in its cell now, 0 the best; missing where it has not completed",
    "train_on": "samples trained on: the tuning split, or all",
}
"""What the columns mean, with their units; `params.NAME` and further factors are described where they occur."""


def export(folder: StudyFolder, to: StoragePath) -> list[StoragePath]:
    """Write all tables of a study that have rows, each as Parquet and CSV, and the dictionary of their columns.

    Args:
        folder: the study's.
        to: the folder to write to; made where it is missing. What earlier exports have left there is replaced.

    Returns:
        The files, the dictionary last.

    Raises:
        StudyError: the folder cannot be written.
    """
    study, found = folder.study(), tables(folder)
    contents: dict[str, bytes] = {}
    for name, frame in found.items():
        out = BytesIO()
        frame.to_parquet(out, index=False)
        contents |= {f"{name}.parquet": out.getvalue(), f"{name}.csv": frame.to_csv(index=False).encode()}
    contents[DICTIONARY] = dictionary(study, found).encode()
    with writing(to):
        storage.make_folder(to)
        for file, content in contents.items():
            storage.write(to / file, content)
    return [to / file for file in contents]


def tables(folder: StudyFolder) -> dict[str, pd.DataFrame]:
    """The tables that have rows, by name, in the order of TABLES; a column holds values of one type."""
    folder = load.Snapshot.of(folder)
    found = {"trials": load.trials(folder), "epochs": load.epochs(folder), "confirmed": load.confirmed(folder)}
    found["confirmed_epochs"] = load.confirmed_epochs(folder)
    for name, source in (("evaluations", "epochs"), ("confirmed_evaluations", "confirmed_epochs")):
        if "within" in found[source]:
            found[name] = load.evaluations(found[source])
            found[source] = found[source].drop(columns="within")
    return {name: _typed(found[name]) for name in TABLES if name in found and len(found[name])}


def dictionary(study: StudySpec, tables: dict[str, pd.DataFrame]) -> str:
    """What each column of each table is, as Markdown."""
    lines = [f"# Columns of the tables of {study.name}", ""]
    if study.source:
        lines += [f"The study follows: {study.source}", ""]
    for name, frame in tables.items():
        lines += [f"## {name}", "", TABLES[name], "", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| {column} | {frame[column].dtype} | {meaning(study, str(column))} |" for column in frame]
        lines.append("")
    return "\n".join(lines)


def meaning(study: StudySpec, column: str) -> str:
    """What a column is, in words."""
    if column in COLUMNS:
        return COLUMNS[column]
    if column.startswith("params."):
        return "tuned value of the hyper-parameter; missing where the cell does not tune it"
    if column in study.factors:
        return f"factor: the study's key {column}"
    return "as the run reported it"


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with columns that mix types, as those of factors may, as text."""
    mixed = [name for name in frame if frame[name].dtype == object and frame[name].map(type).nunique() > 1]
    return frame.assign(**{str(name): frame[name].map(str, na_action="ignore") for name in mixed})
