"""A study that asks for its target: taken from the plain small-batch cell, once, and kept."""

from pathlib import Path

import pytest

from lbstudy.console import session
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.run import Target
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import add_run, study_of

STUDY = study_of(
    ["kfac", "sgd"], [32, 128], ["none", "mixup"], evaluate_every=5,
    tuning={"trials": 4, "metric": "steps_to_target", "target": "auto"},
)  # fmt: skip


def end(accuracy: float) -> list[dict[str, float]]:
    return [{"val_accuracy": 0.99, "clean_train_loss": 0.1}, {"val_accuracy": accuracy, "clean_train_loss": 0.1}]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[StudySpec]:
    """The studies that were tuned; in place of training, records are made."""
    found: list[StudySpec] = []

    def tune(study: StudySpec, path: Path, *rest: object) -> None:
        found.append(study)
        folder = StudyFolder.create(path, study)
        for cell in study.list_cells():
            add_run(folder, cell.name, [{"val_accuracy": 0.9, "val_loss": 0.3}])

    def confirm(study: StudySpec, folder: StudyFolder, runs: list, *rest: object) -> None:
        StudyFolder.create(folder.confirmation.path, study)
        for run, accuracy in zip(runs, (0.8, 0.7, 0.75), strict=True):
            add_run(folder, run.cell, end(accuracy), run.repeat, trial=0)

    monkeypatch.setattr(session, "tune", tune)
    monkeypatch.setattr(session, "confirm_runs", confirm)
    return found


def test_it_is_what_the_worst_seed_of_the_plain_small_batch_ends_with(tmp_path: Path, tuned: list[StudySpec]):
    path = tmp_path / "s"
    study = session.with_target(STUDY, path, {}, False)
    assert study.tuning.target == Target(val_accuracy=0.7)
    (plain,) = tuned
    assert [cell.name for cell in plain.list_cells()] == ["sgd-b32-none"]
    assert (plain.tuning.metric, plain.tuning.target, plain.tuning.trials) == ("val_accuracy", None, 4)
    assert StudyFolder(path).study().tuning.target == Target(val_accuracy=0.7)
    # run again: the same target, and nothing is tuned for it
    assert session.with_target(STUDY, path, {}, False).tuning.target == Target(val_accuracy=0.7)
    assert len(tuned) == 1
    StudyFolder.check(path, STUDY)
    StudyFolder.create(path, STUDY)
    assert StudyFolder(path).study().tuning.target == Target(val_accuracy=0.7)


def test_another_target_is_another_study(tmp_path: Path, tuned: list[StudySpec]):
    path = tmp_path / "s"
    study = session.with_target(STUDY, path, {}, False)
    other = study.model_copy(update={"tuning": study.tuning.model_copy(update={"target": Target(val_accuracy=0.6)})})
    with pytest.raises(StudyError, match="holds another study"):
        StudyFolder.check(path, other)


def test_an_interrupted_search_for_it_goes_on(tmp_path: Path, tuned: list[StudySpec], monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s"
    with monkeypatch.context() as broken:
        broken.setattr(session, "confirm_runs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.with_target(STUDY, path, {}, False)
    assert StudyFolder(path).study().tuning.target == "auto"
    StudyFolder.check(path, STUDY)
    assert session.with_target(STUDY, path, {}, False).tuning.target == Target(val_accuracy=0.7)


def test_no_target_where_that_cell_does_not_train(
    tmp_path: Path, tuned: list[StudySpec], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        session, "confirm_runs", lambda study, folder, *_: StudyFolder.create(folder.confirmation.path, study)
    )
    with pytest.raises(StudyError, match="no confirmed run of sgd-b32-none has completed, so there is no target"):
        session.with_target(STUDY, tmp_path / "s", {}, False)
