"""Tables from constructed records."""

import io
import json
from math import inf, log, nan, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.tables import best as tables
from lbstudy.records.folder import StudyFolder
from tests.confirmed_runs import add_run, confirmed_study, study_of
from tests.conftest import tiny_study
from tests.records.test_folder import record

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


def test_an_end_of_a_level_range_is_none(tmp_path: Path):
    """One standard error of 0.9 on 287 images is 0.0177."""
    runs = [(0.04, 0.9), (0.025, 0.881), (0.02, 0.89), (0.01, 0.883)]  # at the end of the range, and near it
    study = study_of(["sgd"], [32], ["none"], search={"learning_rate": {"log_uniform": [1e-6, 0.05]}})
    folder = StudyFolder.create(tmp_path / "s", study)

    def edge(*further: tuple[float, float], images: int = 1437) -> str:
        folder.keep_data({"digits": {"training images": images}})
        for number, (rate, accuracy) in enumerate([*runs, *further], 1):
            add_run(folder, "sgd-b32-none", [{"val_accuracy": accuracy}], number=number, params={"learning_rate": rate})
        return str(tables.best_configs(folder)["edge"].iloc[0])

    assert edge() == "learning_rate:high"
    assert edge((1e-4, 0.882)) == "learning_rate:high"  # in the middle, and worse
    assert edge((1e-6, 0.9)) == "learning_rate:high"  # as good, at the other end
    assert edge((1e-4, 0.883)) == ""
    assert edge((1e-4, 0.883), images=5000) == "learning_rate:high"  # more images, a smaller error


def test_whether_a_range_is_level_is_asked_of_a_cells_own_validation_split(tmp_path: Path):
    cells = {"optimizer": ["sgd"], "batch_size": [32], "smoothing": ["none"], "dataset.validation_size": [100, 1000]}
    study = tiny_study(cells=cells, published=[], search={"learning_rate": {"log_uniform": [1e-6, 0.05]}})
    folder = StudyFolder.create(tmp_path / "s", study)
    folder.keep_data({"digits": {"training images": 1437}})
    for cell in study.list_cells():
        for number, (rate, accuracy) in enumerate([(0.04, 0.9), (1e-4, 0.88)]):
            metrics = [{"val_accuracy": accuracy}]
            params = {"learning_rate": rate}
            add_run(folder, cell.name, metrics, number=number, params=params, factors=dict(cell.factors))
    assert tables.best_configs(folder)["edge"].tolist() == ["", "learning_rate:high"]


def test_cell_without_a_completed_trial_has_counts_but_no_values(folder: StudyFolder):
    configs = tables.best_configs(folder)
    diverged = configs[(configs["batch_size"] == 128) & (configs["smoothing"] == "none")].iloc[0]
    assert pd.isna(diverged["val_accuracy"])
    assert pd.isna(diverged["learning_rate"])
    assert (diverged["trials"], diverged["diverged"], diverged["edge"]) == (4, 4, "")


def test_different_numbers_of_workers_are_named(folder: StudyFolder):
    for trial in folder.trials():
        trial.workers = [1, 2] if trial.cell == "sgd-b128-none" else [1]
        folder.write_trial(trial)
    assert tables.best_configs(folder)["workers"].tolist() == ["1", "", "1, 2", ""]
    for trial in folder.trials():
        trial.workers = [2]
        folder.write_trial(trial)
    assert "workers" not in tables.best_configs(folder)  # all alike


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
    assert "sgd-b32-mixup+noise: 0" in sentence


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


def test_best_configurations_with_their_confirmed_test_accuracy(tmp_path: Path):
    accuracies = {"sgd-b32-none": [0.8, 0.9, nan], "sgd-b128-none": [0.7]}
    folder = confirmed_study(tmp_path / "c", study_of(["sgd"], [32, 128, 512], ["none"]), accuracies)
    add_run(folder, "sgd-b32-none", [{"test_accuracy": 0.1}], number=3, status="failed", trial=0)
    add_run(folder, "sgd-b32-none", [{"val_accuracy": 0.2}], number=7)  # a worse trial, of rank 1, and its repetition
    add_run(folder, "sgd-b32-none", [{"test_accuracy": 0.1}], number=4, trial=7)
    small, large, unconfirmed = tables.best_configs(folder).to_dict("records")
    assert small["test_accuracy"] == pytest.approx(0.85)
    assert small["test_sd"] == pytest.approx(0.1 / sqrt(2))
    logits = [log(p / (1 - p)) for p in (small["test_low"], 0.85, small["test_high"])]
    assert np.diff(logits) == pytest.approx([12.7062 * 0.05 / (0.85 * 0.15)] * 2, rel=1e-4)
    assert (small["test_min"], small["test_max"]) == (0.8, 0.9)
    assert (small["n"], small["confirmed_diverged"], small["confirmed_unfinished"]) == (2, 1, 1)
    assert (large["test_accuracy"], large["n"]) == (0.7, 1)
    assert pd.isna(large["test_low"])
    assert (unconfirmed["n"], unconfirmed["val_accuracy"]) == (0, 0.9)
    narrow = tables.for_terminal(tables.best_configs(folder))
    assert narrow["test_accuracy"].tolist() == ["0.85 [0.0374, 0.999]", "0.7", "-"]
    assert narrow["confirmed_diverged"].tolist() == ["1", "0", "0"]


def test_counts_of_lost_runs_are_shown_where_there_are_any(tmp_path: Path):
    folder = confirmed_study(tmp_path / "c", study_of(["sgd"], [32], ["none"]), {"sgd-b32-none": [0.8]})
    configs = tables.best_configs(folder)
    assert {"confirmed_diverged", "confirmed_unfinished"} <= set(configs)
    assert not {"confirmed_diverged", "confirmed_unfinished"} & set(tables.for_terminal(configs))


def test_rank_follows_the_trials_as_they_are_now(tmp_path: Path):
    folder = confirmed_study(tmp_path / "c", study_of(["sgd"], [32], ["none"]), {"sgd-b32-none": [0.8]})
    assert load.confirmed(folder)["rank"].tolist() == [0]
    add_run(folder, "sgd-b32-none", [{"val_accuracy": 0.95}], number=1)
    assert load.confirmed(folder)["rank"].tolist() == [1]
    assert tables.best_configs(folder)["n"].tolist() == [0]


def test_epochs_of_confirmed_runs(tmp_path: Path):
    folder = confirmed_study(tmp_path / "c", study_of(["sgd"], [32], ["none"]), {"sgd-b32-none": [0.8]})
    add_run(folder, "sgd-b32-none", [{"test_accuracy": a} for a in (0.1, 0.2)], number=1, trial=0)
    epochs = load.confirmed_epochs(folder)
    assert epochs[["repeat", "epoch", "test_accuracy"]].to_numpy().tolist() == [[0, 1, 0.8], [1, 1, 0.1], [1, 2, 0.2]]
    assert set(load.confirmed_epochs(StudyFolder(tmp_path / "c" / "confirm" / "none"))) <= set(epochs)


NASTY = 'a&b <i>%_x_# {y}~^$z$ \\q "r" | `c` *d* [e](f)'
ESCAPED = {
    "csv": '"a&b <i>%_x_# {y}~^$z$ \\q ""r"" | `c` *d* [e](f)"',
    "json": r'"a&b <i>%_x_# {y}~^$z$ \\q \"r\" | `c` *d* [e](f)"',
    "markdown": r'a&amp;b &lt;i&gt;%\_x\_# {y}\~^\$z\$ &#92;q "r" \| \`c\` \*d\* \[e](f)',
    "latex": r'a\&b <i>\%\_x\_\# \{y\}\textasciitilde \textasciicircum \$z\$ \textbackslash q "r" | `c` *d* [e](f)',
}


@pytest.mark.parametrize("style", ESCAPED)
def test_names_are_escaped_in_every_format(style: str):
    text = tables.render(pd.DataFrame({NASTY: [1.5], "name": [NASTY]}), style)  # type: ignore[arg-type]
    assert text.count(ESCAPED[style]) == 2


def test_markdown_and_csv_and_json_of_nasty_names_read_back():
    table = pd.DataFrame({"name": [NASTY, "two\nlines"]})
    assert pd.read_csv(io.StringIO(tables.render(table, "csv")))["name"].tolist() == table["name"].tolist()
    assert [row["name"] for row in json.loads(tables.render(table, "json"))] == table["name"].tolist()
    lines = tables.render(table, "markdown").splitlines()
    assert len(lines) == 4  # heading, rule, two rows


def test_infinity_and_nothing_in_every_format():
    table = pd.DataFrame({"steps": [inf, nan, 20.0], "n": pd.array([1, None, 3], "Int64")})
    assert tables.render(table, "csv").splitlines()[1:] == ["inf,1", ",", "20.0,3"]
    assert json.loads(tables.render(table, "json")) == [
        {"steps": "Infinity", "n": 1}, {"steps": None, "n": None}, {"steps": 20.0, "n": 3},
    ]  # fmt: skip
    assert tables.for_reading(table).to_numpy().tolist() == [["inf", "1"], ["-", "-"], ["20", "3"]]


def test_an_interval_is_read_beside_its_estimate():
    table = pd.DataFrame({"gap": [0.5, 0.25], "gap_low": [0.125, nan], "gap_high": [1.0, nan], "low": [1, 2]})
    assert tables.for_reading(table).to_dict("list") == {"gap": ["0.5 [0.125, 1]", "0.25"], "low": ["1", "2"]}


def test_large_numbers_are_written_out_and_an_interval_alone_is_none():
    table = pd.DataFrame({"steps": [1437.2, nan], "steps_low": [1185.4, 128.0], "steps_high": [17640.5, inf]})
    assert tables.for_reading(table, digits=3)["steps"].tolist() == ["1440 [1190, 17600]", "-"]


@pytest.mark.parametrize("style", ESCAPED)
def test_a_table_without_rows_has_its_columns(style: str):
    assert "gap" in tables.render(pd.DataFrame(columns=["gap", "n"]), style) or style == "json"  # type: ignore[arg-type]


def test_single_accuracies_are_shown_where_a_run_hardly_learnt(tmp_path: Path):
    cells = {"sgd-b32-none": [0.1, 0.9, 0.92], "sgd-b128-none": [0.7, 0.8, 0.75]}
    narrow = tables.for_terminal(
        tables.best_configs(confirmed_study(tmp_path, study_of(["sgd"], [32, 128], ["none"]), cells))
    )
    assert narrow[["test_min", "test_max"]].to_numpy().tolist() == [["0.1", "0.92"], ["0.7", "0.8"]]
    del cells["sgd-b32-none"]
    folder = confirmed_study(tmp_path / "steady", study_of(["sgd"], [32, 128], ["none"]), cells)
    assert "test_min" not in tables.for_terminal(tables.best_configs(folder))
