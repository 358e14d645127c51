"""What lies on disk."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lbstudy.records.checksum import Damaged
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.file import StudyError
from tests.conftest import TINY_STUDY, tiny_study


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


def with_versions(folder: StudyFolder, **versions: str) -> None:
    """As if a driver had begun that had other ones."""
    found = folder.environment()
    found["packages"] |= versions
    (folder.path / "environment.json").write_text(json.dumps(found))


def test_other_versions_are_told_and_stay_known(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    assert folder.other_versions() == []
    assert "earlier" not in folder.environment()
    now = folder.environment()["packages"]["torch"]
    with_versions(folder, torch="1.13.1")
    assert folder.other_versions() == [f"torch 1.13.1 then, {now} now"]
    for _ in range(2):
        StudyFolder.create(tmp_path / "s", tiny_study())
        assert folder.other_versions() == []
        assert [one["packages"]["torch"] for one in folder.environment()["earlier"]] == ["1.13.1"]
    with_versions(folder, lbstudy="9.9")
    StudyFolder.create(tmp_path / "s", tiny_study())
    assert [one["packages"]["lbstudy"] for one in folder.environment()["earlier"]][1:] == ["9.9"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"packages": 3}', '{"commit": null}'])
def test_versions_that_are_not_known_are_not_told(tmp_path: Path, content: str):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    (folder.path / "environment.json").write_text(content)
    assert folder.other_versions() == []
    StudyFolder.create(tmp_path / "s", tiny_study())
    assert folder.environment()["packages"]


FACTS = {"training images": 60, "test images": 10, "sha256": "ab"}


def test_other_data_are_refused_with_what_differs(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    assert not folder.require_same_data({"digits": FACTS})  # a study of before version 0.2 does not know its data
    folder.keep_data({"digits": FACTS})
    assert folder.require_same_data({"digits": FACTS})
    with pytest.raises(StudyError, match=r"other data.*\ntraining images: 60 then, 37 now\nsha256: ab then, cd now"):
        folder.require_same_data({"digits": FACTS | {"training images": 37, "sha256": "cd"}})


def test_data_of_further_cells_are_added(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.keep_data({"digits": FACTS})
    assert folder.require_same_data({"digits": FACTS, "mnist": FACTS | {"sha256": "cd"}})
    folder.keep_data({"mnist": FACTS | {"sha256": "cd"}})
    with pytest.raises(StudyError, match="sha256: cd then, ab now"):
        folder.require_same_data({"mnist": FACTS})
    assert folder.require_same_data({"digits": FACTS})


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


class Crash(BaseException):
    """The driver dies here."""


class CrashPoint:
    """Makes the operation of one number crash, before or after it is done."""

    def __init__(self, at: int, after: bool):
        self.at, self.after, self.count = at, after, 0

    def crashing(self, function: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **keys: object) -> object:
            self.count += 1
            crash = self.count == self.at
            if crash and not self.after:
                raise Crash
            result = function(*args, **keys)
            if crash:
                raise Crash
            return result

        return operation


def script(folder: StudyFolder, written: list[TrialRecord]) -> None:
    """A trial's life; `written` says which records were asked for."""
    trial = record(number=0)
    for epoch in range(1, 4):
        trial = dataclasses.replace(trial, metrics={"epoch": epoch, "seconds": 1.0})
        written.append(trial)
        folder.write_trial(trial)
        folder.append_epoch(trial, trial.metrics)
        folder.write_state(trial, "checkpoint", epoch, bytes([epoch]) * 1000)
    folder.keep_epochs(trial, 2)
    written.append(dataclasses.replace(trial, status="completed"))
    folder.write_state(trial, "model", 3, b"model")
    folder.write_trial(written[-1])
    folder.drop_state(trial, "checkpoint")


OPERATIONS = [
    (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "mkdir"), (Path, "open"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before the operation", "after it"])
def test_a_crash_at_any_file_system_operation_leaves_a_readable_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
):
    crashes = 0
    for crash_at in range(1, 200):
        point = CrashPoint(crash_at, after)
        folder = StudyFolder.create(tmp_path / str(crash_at), tiny_study())
        written: list[TrialRecord] = []
        with monkeypatch.context() as patch:
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, point.crashing(getattr(owner, name)))
            try:
                script(folder, written)
            except Crash:
                crashes += 1
        found, damaged = folder.scan()
        assert damaged == []
        assert all(trial in written for trial in found)
        assert len(found) <= 1
        for trial in found:
            assert [e["epoch"] for e in folder.epochs(trial)] in ([], [1], [1, 2], [1, 2, 3])
            state = folder.read_state(trial, "checkpoint")
            assert state is None or state == (state[0], bytes([state[0]]) * 1000)
        if point.count < crash_at:
            break
    assert crashes > 30
    assert found == [written[-1]]  # the last round did not crash


def test_a_crash_in_the_middle_of_a_line_costs_that_line(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(record())
    for epoch in (1, 2, 3):
        folder.append_epoch(record(), {"epoch": epoch})
    series = folder.trial_folder(record()) / "epochs.jsonl"
    series.write_bytes(series.read_bytes()[:-4])
    assert [e["epoch"] for e in folder.epochs(record())] == [1, 2]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:40], lambda b: b.replace(b"0.1", b"0.2"), lambda b: b""]
)
def test_damaged_record_is_found(tmp_path: Path, damage: Callable[[bytes], bytes]):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(record())
    path = folder.trial_folder(record()) / "trial.json"
    path.write_bytes(damage(path.read_bytes()))
    assert folder.scan() == ([], [path])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b.replace(b" 7\n", b" 8\n"), lambda b: b""]
)
def test_damaged_checkpoint_is_found(tmp_path: Path, damage: Callable[[bytes], bytes]):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(record())
    folder.write_state(record(), "checkpoint", 7, b"state")
    assert folder.read_state(record(), "checkpoint") == (7, b"state")
    path = folder.trial_folder(record()) / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Damaged):
        folder.read_state(record(), "checkpoint")


EXTENSIONS = {
    "more trials": ({"tuning": TINY_STUDY["tuning"] | {"trials": 9}}, None),
    "more cells": ({"cells": TINY_STUDY["cells"] | {"batch_size": [32, 128, 256]}}, None),
    "other resources": ({"resources": {"workers": 2}}, None),
    "images elsewhere": ({"dataset": {**TINY_STUDY["dataset"], "residency": "host"}}, None),
    "fewer trials": ({"tuning": TINY_STUDY["tuning"] | {"trials": 3}}, "trials: 3"),
    "fewer cells": ({"cells": TINY_STUDY["cells"] | {"smoothing": ["none"]}}, "mixup"),
    "another budget": ({"budget": {"epochs": 5}}, "epochs: 5"),
    "another range": ({"search": TINY_STUDY["search"] | {"learning_rate": {"log_uniform": [1e-3, 1]}}}, "1000000"),
    "another seed": ({"seed": 1}, "seed: 1"),
}


def test_what_may_change_is_not_to_take_back(tmp_path: Path):
    StudyFolder.create(tmp_path / "s", tiny_study())
    with pytest.raises(StudyError, match="seed: 7") as raised:
        StudyFolder.check(tmp_path / "s", tiny_study(seed=7, resources={"cpus_per_worker": 2}, labels={"sgd": "S"}))
    assert [line for line in str(raised.value).splitlines() if line[0] in "+-"] == ["-seed: 0", "+seed: 7"]


@pytest.mark.parametrize("case", EXTENSIONS)
def test_a_study_may_grow_but_not_change(tmp_path: Path, case: str):
    changes, difference = EXTENSIONS[case]
    StudyFolder.create(tmp_path / "s", tiny_study())
    if difference is None:
        assert StudyFolder.create(tmp_path / "s", tiny_study(**changes)).study() == tiny_study(**changes)
        return
    with pytest.raises(StudyError, match="holds another study") as raised:
        StudyFolder.check(tmp_path / "s", tiny_study(**changes))
    assert difference in str(raised.value)
    assert StudyFolder(tmp_path / "s").study() == tiny_study()
