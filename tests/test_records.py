"""What lies on disk."""

import json
import os
from pathlib import Path

import pytest

from lbstudy.records import StudyFolder, TrialRecord
from lbstudy.study import StudyError
from tests.conftest import tiny_study


def record(**changes: object) -> TrialRecord:
    values: dict[str, object] = {
        "cell": "sgd-b32-none", "number": 3, "optimizer": "sgd", "batch_size": 32, "smoothing": "none",
        "params": {"learning_rate": 0.1}, "seed": 7, "run": {},
    }  # fmt: skip
    return TrialRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_study_and_trials_read_back(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    written = record(status="completed", metrics={"epoch": 2, "val_loss": 0.25})
    folder.write_trial(written)
    folder.append_epoch(written, {"epoch": 1})
    folder.append_epoch(written, {"epoch": 2})
    again = StudyFolder.open(tmp_path / "s")
    assert again.study() == tiny_study()
    assert again.trials() == [written]
    assert again.epochs(written) == [{"epoch": 1}, {"epoch": 2}]
    assert again.epochs(record(number=4)) == []
    environment = json.loads((tmp_path / "s" / "environment.json").read_text())
    assert environment["packages"]["ray"] == "2.60.0"


def test_trial_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(record(status="running"))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.write_trial(record(status="completed"))
    assert [t.status for t in folder.trials()] == ["running"]


def test_folder_must_be_new_and_writable(tmp_path: Path):
    (tmp_path / "something").write_text("")
    with pytest.raises(StudyError, match="is not empty"):
        StudyFolder.create(tmp_path, tiny_study())
    with pytest.raises(StudyError, match="cannot be written"):
        StudyFolder.check(tmp_path / "something" / "s", tiny_study())
    with pytest.raises(StudyError, match="no study here"):
        StudyFolder.open(tmp_path / "nowhere")
    StudyFolder.check(tmp_path / "new" / "s", tiny_study())
    assert not (tmp_path / "new").exists()
