"""Records of confirmed runs that are damaged: left out, and named by every command that would have counted them."""

import shutil
from collections import Counter
from math import isnan
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbstudy.analysis import load
from lbstudy.analysis.report import page
from lbstudy.analysis.tables import best, cost, health, targets
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder
from tests.analysis.report.test_page import CELLS, whole_study
from tests.confirmed_runs import add_run, study_of
from tests.conftest import TINY_STUDY

LOST_RECORD = "confirm/trials/sgd-b32-none/0001/trial.json"
LOST_EPOCHS = "confirm/trials/sgd-b128-none/0002/epochs.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A whole study, of which a record and the last lines of a run's epochs have been lost."""
    folder = whole_study(tmp_path_factory.mktemp("damaged") / "s")
    (folder.path / LOST_RECORD).write_text('{"cell": ')
    epochs = folder.path / LOST_EPOCHS
    epochs.write_text("".join(epochs.read_text().splitlines(keepends=True)[:2]))
    (folder.path / "trials" / "kfac-b32-none" / "0000" / "trial.json").write_text("")
    return folder


def test_what_is_damaged_is_named_with_the_command_that_mends_it(folder: StudyFolder):
    trials, confirmed, epochs = load.trials(folder), load.confirmed(folder), load.confirmed_epochs(folder)
    named = load.list_damaged(trials, confirmed, epochs)
    assert [sentence.split(": ")[1].split(";")[0] for sentence in named] == [
        "trials/kfac-b32-none/0000/trial.json", LOST_RECORD, LOST_EPOCHS,
    ]  # fmt: skip
    assert ["`lbstudy run`" in sentence for sentence in named] == [True, False, False]
    assert ["`lbstudy confirm`" in sentence for sentence in named] == [False, True, True]
    assert load.list_damaged(trials.head(0), confirmed.head(0)) == named[:2]


def test_a_run_whose_epochs_are_incomplete_has_no_times_and_is_not_one_that_never_arrives(folder: StudyFolder):
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    table = targets.targets_table(CELLS, confirmed, epochs, [targets.Target("clean_train_loss", 0.5)])
    rows = table.set_index(["optimizer", "batch_size", "smoothing"])
    assert list(rows.loc[("sgd", 128, "none"), ["n", "reached", "epochs"]]) == [2, 2, 2]
    assert "1 of 3 confirmed runs failed, go on or are damaged" in rows.loc[("sgd", 128, "none"), "note"]
    assert list(rows.loc[("sgd", 128, "mixup"), ["n", "reached", "epochs"]]) == [3, 3, 2]


def test_a_cell_with_fewer_confirmed_runs_is_named(folder: StudyFolder):
    missing = health.list_missing(CELLS, load.trials(folder), load.confirmed(folder))
    assert "sgd-b32-none has 2 of 3 confirmed runs; `lbstudy confirm` goes on." in missing


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["status"], ["trials/kfac-b32-none/0000/trial.json"]),
        (["best"], ["trials/kfac-b32-none/0000/trial.json", LOST_RECORD]),
        (["table", "gap"], ["trials/kfac-b32-none/0000/trial.json", LOST_RECORD, LOST_EPOCHS]),
        (["table", "targets"], ["trials/kfac-b32-none/0000/trial.json", LOST_RECORD, LOST_EPOCHS]),
    ],
    ids=str,
)
def test_the_commands_name_what_they_do_not_count(folder: StudyFolder, arguments: list[str], files: list[str]):
    command, *kind = arguments
    result = CliRunner().invoke(app, [command, str(folder.path), *kind])
    assert result.exit_code == 0, result.output
    for file in files:
        assert file in result.stderr.replace("\n", "")
    assert "Damaged" not in result.stdout


def test_a_copy_of_a_run_is_not_another_run(tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    before = load.confirmed(folder)
    run = folder.path / "confirm" / "trials" / "sgd-b32-none" / "0000"
    shutil.copytree(run, run.with_name("0000.bak"))
    confirmed = load.confirmed(folder)
    assert len(confirmed) == len(before)
    assert confirmed.attrs["left_out"] == ["confirm/trials/sgd-b32-none/0000.bak/trial.json"]


@pytest.mark.parametrize("line", ["[1]", "1", '"epoch"', "null"])
def test_a_line_of_epochs_that_is_no_mapping_is_damaged(line: str, tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    (folder.path / LOST_EPOCHS).write_text(line + "\n")
    assert load.confirmed_epochs(folder).attrs["left_out"] == [LOST_EPOCHS]


def test_the_folder_of_the_confirmed_runs_is_no_study(tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    (folder.confirmation.path / "study.yaml").write_bytes((folder.path / "study.yaml").read_bytes())
    result = CliRunner().invoke(app, ["best", str(folder.confirmation.path)])
    assert "these are the confirmed runs of a study; its folder is" in str(result.exception)


def test_a_snapshot_reads_each_record_and_each_series_once(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch):
    """All that `status` and `report` show, from one look at the folder."""
    reads: Counter[str] = Counter()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.update([str(path)]) or read_bytes(path))
    snapshot = load.Snapshot(folder)
    shown = best.progress(snapshot)
    cost.standing(snapshot)
    page.collect(snapshot)
    seen = {path: count for path, count in reads.items() if path.endswith("trial.json")}
    assert set(seen.values()) == {1}
    assert len(seen) == len(list(folder.path.glob("**/trial.json")))
    assert max(count for path, count in reads.items() if path.endswith("epochs.jsonl")) == 1
    assert shown.equals(best.progress(folder))


def test_a_snapshot_is_of_one_moment(tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    snapshot = load.Snapshot(folder)
    before = load.trials(snapshot)
    (folder.path / "trials" / "kfac-b32-none" / "0000" / "trial.json").write_text("")
    assert load.trials(snapshot) is before
    assert len(load.trials(folder)) == len(before) - 1


def test_trials_without_series_make_a_page(tmp_path: Path):
    """As a disk that has lost them leaves a study."""
    folder = whole_study(tmp_path / "s")
    shutil.rmtree(folder.path / "confirm")
    for series in folder.path.glob("trials/*/*/epochs.jsonl"):
        series.unlink()
    assert list(load.epochs(folder)) == [*load.KEY, "epoch", "seconds"]
    pictures = {picture.name: picture for picture in page.collect(folder).pictures}
    assert pictures["learning_curves"].reason == "no run was confirmed and no trial has completed"
    assert pictures["best_learning_rates"].svg


CURVE = [
    {"val_accuracy": 0.5, "val_loss": 1.0, "test_accuracy": 0.51},
    {"val_accuracy": 0.7, "val_loss": 0.9, "test_accuracy": 0.68},
    {"val_accuracy": 0.7, "val_loss": 0.8, "test_accuracy": 0.69},
    {"val_accuracy": 0.6, "val_loss": 1.2, "test_accuracy": 0.61},
]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("val_accuracy", (2, 0.68)), ("val_loss", (3, 0.69)), ("epochs_to_target", (2, 0.68))],  # of equals the first
)
def test_a_run_is_read_where_its_validation_was_best_too(tmp_path: Path, metric: str, expected: tuple[int, float]):
    tuning = TINY_STUDY["tuning"] | {"metric": metric}
    tuning |= {"target": {"val_accuracy": 0.6}} if metric.endswith("target") else {}
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32], ["none"], tuning=tuning))
    add_run(folder, "sgd-b32-none", CURVE)
    for number, (status, train_on) in enumerate(
        [("completed", "split"), ("completed", "all"), ("diverged", "split"), ("completed", "split")]
    ):
        add_run(folder, "sgd-b32-none", CURVE, number, status, trial=0, run={"train_on": train_on})
    *_, last = folder.confirmation.each()
    (folder.confirmation.trial_folder(last) / "epochs.jsonl").unlink()
    first, *others = load.confirmed(folder)[["best_epoch", "test_at_best_epoch"]].itertuples(index=False)
    assert tuple(first) == expected
    assert all(isnan(value) for other in others for value in other)
