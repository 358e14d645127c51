"""Published configurations beside the tuned ones, against means and t intervals by hand."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from lbstudy.analysis.tables.published import published_table
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder
from tests.confirmed_runs import add_run, study_of

BEST, LITERATURE = [0.80, 0.83, 0.85], [0.70, 0.72, 0.77]


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """A cell whose published configuration (trial 0) has lost to trial 1, and one in which it is the best."""
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32, 128], ["none"]))
    for cell, values in {"sgd-b32-none": [0.7, 0.8], "sgd-b128-none": [0.9, 0.8]}.items():
        for number, value in enumerate(values):
            add_run(folder, cell, [{"val_accuracy": value}], number=number, published=number == 0)
    run = {"train_on": "split"}
    for repeat in range(3):
        for number, (trial, values) in enumerate({0: LITERATURE, 1: BEST}.items()):
            report = {"val_accuracy": 0.5, "test_accuracy": values[repeat]}
            keys = {"number": 2 * repeat + number, "repeat": repeat, "trial": trial, "published": not trial, "run": run}
            add_run(folder, "sgd-b32-none", [report], **keys)
        add_run(folder, "sgd-b128-none", [{"test_accuracy": 0.9}], repeat, trial=0, published=True, run=run)
    return folder


def test_the_table(folder: StudyFolder):
    lost, best = published_table(folder).to_dict("records")
    assert (lost["batch_size"], lost["n"], best["n"]) == (32, 3, 3)
    assert lost["learning_rate"] > 0
    assert lost["val_accuracy"] == 0.5
    for name, values in (("test_accuracy", LITERATURE), ("tuning_adds", np.subtract(BEST, LITERATURE))):
        found = scipy.stats.ttest_1samp(values, 0).confidence_interval()
        assert lost[name] == pytest.approx(np.mean(values))
        if name == "tuning_adds":
            assert (lost[f"{name}_low"], lost[f"{name}_high"]) == pytest.approx((found.low, found.high))
        assert lost[f"{name}_low"] < lost[name] < lost[f"{name}_high"]
    assert best["note"] == "it is the best one"
    assert np.isnan(best["tuning_adds"])


def test_without_published_runs_it_is_empty(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    assert published_table(folder).empty
    add_run(folder, "sgd-b32-none", [{"val_accuracy": 0.7}])
    assert published_table(folder).empty


def test_the_command(folder: StudyFolder):
    result = CliRunner().invoke(app, ["table", str(folder.path), "published", "--format", "csv"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith(
        "optimizer,batch_size,smoothing,learning_rate,val_accuracy,test_acc"
    )
    assert len(result.stdout.splitlines()) == 3
