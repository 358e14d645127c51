"""Made-up studies, as a driver leaves them and as it grows them."""

from __future__ import annotations

from pathlib import Path

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.storage import StoragePath
from tests.conftest import tiny_study
from tests.records.test_folder import record

STARTED = "2026-03-01T12:00:00.000+00:00"
BEGAN = 1772366400.0


def make_study(path: StoragePath | Path) -> StudyFolder:
    return StudyFolder.create(path, tiny_study())


def epoch(number: int, offset: float = 0.0) -> dict[str, object]:
    return {"epoch": number, "val_loss": offset + 1 / number, "train_loss": None, "seconds": 2.0}


def add_trial(
    folder: StudyFolder, number: int, epochs: int, status: str = "completed", **changes: object
) -> TrialRecord:
    made = record(number=number, started=STARTED, status=status, params={"learning_rate": 0.1 + number}, **changes)
    for entry in range(1, epochs + 1):
        add_epoch(folder, made, entry)
    folder.write_trial(made)
    return made


def add_epoch(folder: StudyFolder, trial: TrialRecord, number: int) -> None:
    trial.metrics = epoch(number, trial.number)
    folder.trial_folder(trial).mkdir(parents=True, exist_ok=True)
    folder.append_epoch(trial, trial.metrics)


def make_mixed(path: StoragePath | Path) -> StudyFolder:
    """Four trials, one of which still runs, and a confirmed run."""
    folder = make_study(path)
    for number, (epochs, status) in enumerate([(4, "completed"), (2, "pruned"), (1, "diverged"), (3, "running")]):
        add_trial(folder, number, epochs, status)
    confirmed = StudyFolder.create(folder.confirmation.path, folder.study())
    add_trial(confirmed, 0, 4, trial=0, repeat=0)
    return folder
