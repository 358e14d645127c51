"""Tables from constructed records."""

import io
import json
from pathlib import Path

import pandas as pd
import pytest

from analysis import load, tables
from lbstudy.records import StudyFolder
from tests.conftest import tiny_study
from tests.test_records import record

COLUMNS = (
    "optimizer,batch_size,smoothing,learning_rate,mixup_alpha,noise_magnitude,val_accuracy,val_loss,epochs,"
    "trials,completed,pruned,diverged,failed,edge"
)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Four cells: one with results of every kind, one whose trials all diverged, two without trials."""
    folder = StudyFolder.create(tmp_path / "s", tiny_study())

    def add(number: int, status: str, rate: float, accuracy: float | None, **changes: object) -> None:
        metrics = {"epoch": 4, "step": 40, "val_accuracy": accuracy, "val_loss": 0.5, "train_loss": 0.4}
        trial = record(number=number, status=status, params={"learning_rate": rate}, metrics=metrics, **changes)
        folder.write_trial(trial)
        folder.append_epoch(trial, metrics | {"epoch": 1})

    add(0, "completed", 1.0, 0.7)
    add(1, "completed", 9e5, 0.9)
    add(2, "pruned", 2.0, 0.99)  # ahead when it was pruned, but it had less budget
    add(3, "failed", 2.0, None)
    for number in range(4):
        add(number, "diverged", 5.0, 0.1, cell="sgd-b128-none", batch_size=128)
    return folder


def test_best_is_the_best_completed_trial(folder: StudyFolder):
    configs = tables.best_configs(folder)
    assert len(configs) == 4
    best = configs.iloc[0]
    assert (best["learning_rate"], best["val_accuracy"], best["epochs"]) == (9e5, 0.9, 4)
    assert best[["trials", "completed", "pruned", "diverged", "failed"]].tolist() == [4, 2, 1, 0, 1]
    assert best["edge"] == "learning_rate:high"


def test_cell_without_a_completed_trial_has_counts_but_no_values(folder: StudyFolder):
    configs = tables.best_configs(folder)
    diverged = configs[(configs["batch_size"] == 128) & (configs["smoothing"] == "none")].iloc[0]
    assert pd.isna(diverged["val_accuracy"])
    assert pd.isna(diverged["learning_rate"])
    assert (diverged["trials"], diverged["diverged"], diverged["edge"]) == (4, 4, "")


def test_csv_has_the_documented_columns_and_full_precision(folder: StudyFolder):
    text = tables.render(tables.best_configs(folder), "csv")
    assert text.splitlines()[0] == COLUMNS
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])[["learning_rate", "trials"]],
        tables.best_configs(folder)[["learning_rate", "trials"]],
    )


def test_json_markdown_and_latex(folder: StudyFolder):
    configs = tables.best_configs(folder)
    rows = json.loads(tables.render(configs, "json"))
    assert [row["val_accuracy"] for row in rows] == [0.9, None, None, None]
    assert tables.render(configs, "markdown").splitlines()[0].startswith("| optimizer")
    latex = tables.render(configs, "latex")
    assert "\\toprule" in latex
    assert "batch\\_size" in latex
    assert "learning\\_rate:high" in latex


def test_unequal_budgets_are_said(folder: StudyFolder):
    sentence = tables.budget_sentence(folder.study(), tables.best_configs(folder))
    assert "Not a fair comparison yet" in sentence
    assert "sgd 32 mixup+noise: 0" in sentence


def test_minimised_metric(tmp_path: Path):
    tuning = {"trials": 2, "metric": "val_loss", "direction": "minimize"}
    folder = StudyFolder.create(tmp_path / "m", tiny_study(tuning=tuning))
    for number, loss in enumerate((0.5, 0.3)):
        folder.write_trial(record(number=number, status="completed", metrics={"epoch": 4, "val_loss": loss}))
    assert tables.best_configs(folder)["val_loss"].iloc[0] == 0.3


def test_tables_of_an_empty_study(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "e", tiny_study())
    assert tables.best_configs(folder)["trials"].tolist() == [0] * 4
    assert tables.progress(folder)["done"].tolist() == [0] * 4
    assert load.trials(folder).empty
    assert load.epochs(folder).empty


def test_tidy_frames(folder: StudyFolder):
    trials = load.trials(folder)
    assert len(trials) == 8
    assert trials[trials["cell"] == "sgd-b32-none"]["params.learning_rate"].tolist() == [1.0, 9e5, 2.0, 2.0]
    assert set(load.epochs(folder)) >= {"cell", "number", "epoch", "val_accuracy"}


def test_progress_counts(folder: StudyFolder):
    row = tables.progress(folder).iloc[0]
    assert (row["cell"], row["done"], row["of"], row["failed"], row["best val_accuracy"]) == (
        "sgd-b32-none",
        4,
        4,
        1,
        0.9,
    )
