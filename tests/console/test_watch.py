"""`lbstudy watch`: a page that is written again while a study runs, and an end."""

import signal
import time
from pathlib import Path

import pytest

from lbstudy.analysis.report import page
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock
from tests.confirmed_runs import PARAMS, add_run, study_of
from tests.console.test_cli import lbstudy

TRIAL = [{"val_accuracy": 0.9, "val_loss": 0.3, "images_per_second": 100.0}]


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Of two cells with a trial each, of which one is missing."""
    study = study_of(["sgd"], [32, 128], ["none"], tuning={"trials": 1})
    folder = StudyFolder.create(tmp_path / "watched", study)
    add_run(folder, "sgd-b32-none", TRIAL, params=PARAMS)
    return folder


def test_it_writes_pages_until_the_study_is_complete(folder: StudyFolder, monkeypatch, capsys):
    pages = []

    def sleep(seconds: float) -> None:
        pages.append((folder.path / page.PAGE).read_text())
        add_run(folder, "sgd-b128-none", TRIAL, params=PARAMS)

    monkeypatch.setattr(time, "sleep", sleep)
    assert lbstudy(monkeypatch, "watch", str(folder.path), "--interval", "7") == 0
    told = capsys.readouterr().err.splitlines()
    assert "1/2 trials, no driver at work" in told[0]
    assert told[1] == f"complete: 2 of 2 trials; the report is {folder.path / page.PAGE}"
    (running,) = pages
    assert "location.reload" in running
    assert "No driver is at work." in running
    assert "location.reload" not in (folder.path / page.PAGE).read_text()


def test_it_stays_while_a_complete_study_is_confirmed(folder: StudyFolder, monkeypatch, capsys):
    add_run(folder, "sgd-b128-none", TRIAL, params=PARAMS)
    lock = DriverLock(folder.path, print)
    monkeypatch.setattr(time, "sleep", lambda seconds: lock.__exit__(None, None, None))
    with lock:
        assert lbstudy(monkeypatch, "watch", str(folder.path)) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()][-1] == "complete"


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_ends_it_with_a_line(folder: StudyFolder, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    assert lbstudy(monkeypatch, "watch", str(folder.path)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted by SIGINT; the last page stays"


def test_what_is_no_study(monkeypatch, capsys, tmp_path: Path):
    assert lbstudy(monkeypatch, "watch", str(tmp_path)) == 2
    assert "no study here" in capsys.readouterr().err
