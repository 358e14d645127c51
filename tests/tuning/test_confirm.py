"""Confirmed runs, and what is computed of their solutions."""

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from lbstudy.analysis import load
from lbstudy.analysis.minima import compute as minima
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.file import StudyError
from lbstudy.study.run import RunSpec, TrainOn
from lbstudy.training import datasets
from lbstudy.training.data import place
from lbstudy.training.train import EpochReport, Snapshot, evaluate, train
from lbstudy.tuning.confirm import as_study, plan_runs
from lbstudy.tuning.recorder import trajectory
from tests.confirmed_runs import add_run, study_of
from tests.conftest import RanStudy

DIGITS = {"name": "digits", "validation_size": 0.2}


def plan(folder: StudyFolder, seeds: int = 2, top: int = 1, published: bool = False, train_on: TrainOn = "split"):
    notices: list[str] = []
    return plan_runs(folder, folder.study(), seeds, top, published, train_on, notices.append), notices


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Two cells with a completed trial each, the better one of the first being number 1, and a cell without."""
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32, 128], ["none", "mixup+noise"]))
    add_run(folder, "sgd-b32-none", [{"val_accuracy": 0.8}], number=0, published=True)
    add_run(folder, "sgd-b32-none", [{"val_accuracy": 0.9}], number=1)
    add_run(folder, "sgd-b128-none", [{"val_accuracy": 0.7}], number=0)
    add_run(folder, "sgd-b32-mixup+noise", [{"val_accuracy": 0.7}], number=0, status="diverged")
    return folder


def key(run: TrialRecord) -> tuple[str, int, int | None, int]:
    return run.cell, run.number, run.trial, run.repeat


def test_each_best_configuration_gets_the_same_fresh_seeds(folder: StudyFolder):
    runs, notices = plan(folder)
    assert [key(r) for r in runs] == [
        ("sgd-b32-none", 0, 1, 0), ("sgd-b128-none", 0, 0, 0), ("sgd-b32-none", 1, 1, 1), ("sgd-b128-none", 1, 0, 1),
    ]  # fmt: skip
    assert runs[0].seed == runs[1].seed != runs[2].seed == runs[3].seed
    assert not {run.seed for run in runs} & {trial.seed for trial in folder.trials()}
    assert all(run.run["evaluate"] == "all" for run in runs)
    assert [n.split(" ")[0] for n in notices] == ["sgd-b32-mixup+noise", "sgd-b128-mixup+noise"]


def test_more_seeds_and_configurations_leave_the_runs_that_are_there_as_they_are(folder: StudyFolder):
    first, _ = plan(folder)
    for run in first:
        folder.confirmation.write_trial(run)
    more, _ = plan(folder, seeds=3, top=2)
    assert {key(r) for r in first} < {key(r) for r in more}
    assert len({(r.cell, r.number) for r in more}) == len(more) == 9


def test_published_configurations_are_confirmed_once(folder: StudyFolder):
    published, _ = plan(folder, seeds=1, published=True)
    assert [key(r)[2] for r in published if r.cell == "sgd-b32-none"] == [1, 0]
    assert len(plan(folder, seeds=1, top=2, published=True)[0]) == 3  # the published one is the second best


def test_training_samples_do_not_change_within_a_confirmation(folder: StudyFolder):
    folder.confirmation.write_trial(plan(folder)[0][0])
    with pytest.raises(StudyError, match="--train-on split, which do not compare with --train-on all"):
        plan(folder, train_on="all")


def test_nothing_to_confirm_is_an_error(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    with pytest.raises(StudyError, match="no trial has completed yet"):
        plan(folder)


def test_confirmation_prunes_nothing_and_keeps_every_model(folder: StudyFolder):
    runs, _ = plan(folder)
    study = as_study(folder.study(), runs)
    assert (study.tuning.pruner, study.tuning.trials, study.resources.keep_best) == ("none", 2, 2)


@pytest.mark.parametrize(("epochs", "first", "count"), [(1, [], 0), (4, [1, 2, 3], 3), (150, [8, 15, 22], 19)])
def test_models_on_the_way_are_evenly_spread(epochs: int, first: list[int], count: int):
    assert trajectory(epochs)[:3] == first
    assert len(trajectory(epochs)) == count


def run_of(**changes: object) -> RunSpec:
    defaults = {
        "model": "lenet5", "dataset": DIGITS, "batch_size": 128, "optimizer": "sgd",
        "hyper": {"learning_rate": 0.05}, "budget": {"epochs": 3}, "evaluate": "all",
    }  # fmt: skip
    return RunSpec.model_validate(defaults | changes)


class TestEvaluateAll:
    def test_reports_training_images_as_they_are_and_the_test_set(self):
        run = run_of()
        data = place(datasets.load(run.dataset), run.dataset, 0)
        outcome = train(run, data)
        last = outcome.last
        assert (last.clean_train_loss, last.clean_train_accuracy) == evaluate(outcome.model, data, data.train)
        assert (last.test_loss, last.test_accuracy) == evaluate(outcome.model, data, data.test)

    def test_changes_nothing_that_is_learnt(self):
        run = run_of()
        data = place(datasets.load(run.dataset), run.dataset, 0)
        plain = train(run.model_copy(update={"evaluate": "validation"}), data)
        assert train(run, data).fingerprint == plain.fingerprint
        assert plain.last.test_loss is None
        assert plain.best is None

    def test_best_model_survives_an_interruption(self):
        run = run_of(budget={"epochs": 5}, hyper={"learning_rate": 0.3})
        data = place(datasets.load(run.dataset), run.dataset, 0)
        snapshots: list[Snapshot] = []
        accuracies: list[float] = []

        def keep(report: EpochReport, snapshot) -> bool:
            accuracies.append(report.val_accuracy)
            buffer = io.BytesIO()
            torch.save(snapshot(), buffer)
            snapshots.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
            return False

        whole = train(run, data, on_epoch=keep)
        assert whole.best is not None
        assert whole.best["epoch"] == 1 + accuracies.index(max(accuracies))
        for snapshot in snapshots[:-1]:
            best = train(run, data, resume=snapshot).best
            assert best is not None
            assert best["epoch"] == whole.best["epoch"]
            assert all(torch.equal(best["model"][n], whole.best["model"][n]) for n in best["model"])

    def test_training_on_all_leaves_nothing_to_choose_by(self):
        run = run_of(train_on="all", budget={"epochs": 1})
        data = place(datasets.load(run.dataset), run.dataset, 0, train_on="all")
        assert len(data.train) == len(datasets.load(run.dataset).train_labels)
        assert train(run, data).best is None


@pytest.fixture(scope="module")
def confirmed(ran_study: RanStudy, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A copy of the tiny study, its best configurations confirmed with two seeds."""
    from lbstudy.tuning import tuner

    path = tmp_path_factory.mktemp("confirmed") / "tiny"
    shutil.copytree(ran_study.folder.path, path)
    folder = StudyFolder(path)
    study = folder.study()
    runs, _ = plan(folder)
    StudyFolder.create(folder.confirmation.path, study)
    one_lane = study.model_copy(update={"resources": study.resources.model_copy(update={"lanes": 1})})
    planned = tuner.plan(as_study(one_lane, runs), datasets.load_all(study), tuner.cluster_nodes())
    tuner.confirm_runs(folder.confirmation, planned, runs, lambda run: None, print)
    return folder


def test_confirmed_runs_train_to_the_end_and_keep_their_models(confirmed: StudyFolder):
    frame = load.confirmed(confirmed)
    assert len(frame) == 8
    assert set(frame["status"]) == {"completed"}
    assert (frame["rank"] == 0).all()
    where = confirmed.confirmation
    for run in where.trials():
        assert [entry["epoch"] for entry in where.epochs(run)] == [1, 2, 3, 4]
        assert where.models_on_the_way(run) == (["epoch-0001", "epoch-0002", "epoch-0003"] if run.repeat == 0 else [])
        kept = where.read_state(run, "best")
        assert kept is not None
        spec = RunSpec.model_validate(run.run)
        data = place(datasets.load(spec.dataset), spec.dataset, spec.split_seed)
        outcome = train(spec, data)
        assert outcome.fingerprint == run.fingerprint
        assert outcome.best is not None
        best = torch.load(io.BytesIO(kept[1]), weights_only=True)
        assert all(torch.equal(best[name], tensor) for name, tensor in outcome.best["model"].items())


def test_confirming_again_runs_nothing(confirmed: StudyFolder):
    from lbstudy.tuning import tuner

    before = [(run.started, run.seconds) for run in confirmed.confirmation.trials()]
    runs, _ = plan(confirmed)
    study = confirmed.study()
    planned = tuner.plan(as_study(study, runs), datasets.load_all(study), tuner.cluster_nodes())
    told: list[TrialRecord] = []
    shown: list[TrialRecord] = []
    tuner.confirm_runs(confirmed.confirmation, planned, runs, shown.append, print, taken_up=told.extend)
    assert not shown
    assert {(run.cell, run.number): run.status for run in told} == {(r.cell, r.number): "completed" for r in runs}
    assert [(run.started, run.seconds) for run in confirmed.confirmation.trials()] == before


def compute(folder: StudyFolder, kind: minima.Kind, settings: minima.LandscapeSettings) -> list[minima.Task]:
    tasks = minima.landscape_tasks(folder, kind, minima.best_runs(folder, repeats=1), settings)
    missing, failures = minima.missing(folder, tasks), list[str]()
    study = folder.study()
    minima.compute(folder, study, datasets.load_all(study), missing, lambda task: None, lambda t, e: failures.append(e))
    assert failures == []
    return missing


def points(folder: StudyFolder, task: minima.Task) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO((folder.path / task.result).read_bytes()))


def test_ends_of_an_interpolation_are_the_recorded_losses(confirmed: StudyFolder):
    tasks = compute(confirmed, "interpolate", minima.LandscapeSettings())
    assert len(tasks) == 2
    frame = load.confirmed(confirmed)
    for task in tasks:
        found = points(confirmed, task).set_index("a")
        end = task.states[1][0]
        small = frame[(frame["smoothing"] == end.smoothing) & (frame["repeat"] == 0) & (frame["batch_size"] == 32)]
        large = frame[(frame["cell"] == end.cell) & (frame["repeat"] == 0)]
        for a, run in ((0.0, small), (1.0, large)):
            assert found.loc[a, "train_loss"] == pytest.approx(run["clean_train_loss"].item(), abs=1e-6)
            assert found.loc[a, "test_loss"] == pytest.approx(run["test_loss"].item(), abs=1e-6)
            assert found.loc[a, "test_accuracy"] == pytest.approx(run["test_accuracy"].item(), abs=1e-9)


def test_what_has_its_file_is_not_computed_again(confirmed: StudyFolder):
    settings = minima.LandscapeSettings(directions=2, samples=50)
    tasks = compute(confirmed, "line", settings)
    assert len(tasks) == 4 * 2  # 102 points each: two parts
    (confirmed.path / tasks[3].result).unlink()
    assert compute(confirmed, "line", settings) == [tasks[3]]
    whole = pd.concat([points(confirmed, task) for task in tasks[:2]])
    assert list(whole["direction"]) == [0] * 51 + [1] * 51
    assert (whole["train_samples"] == 50).all()


def test_results_with_other_settings_are_not_mixed(confirmed: StudyFolder):
    minima.keep_settings(confirmed, "landscape/plane", minima.LandscapeSettings(seed=1))
    minima.keep_settings(confirmed, "landscape/plane", minima.LandscapeSettings(seed=2))  # of the first came no result
    result = confirmed.path / "landscape" / "plane" / "sgd-b32-none" / "000.npz"
    result.parent.mkdir()
    result.touch()
    minima.keep_settings(confirmed, "landscape/plane", minima.LandscapeSettings(seed=2))
    with pytest.raises(StudyError, match=r"holds results with seed 2 \(now 1\); remove the folder"):
        minima.keep_settings(confirmed, "landscape/plane", minima.LandscapeSettings(seed=1))


def test_runs_whose_models_are_there_come_first(confirmed: StudyFolder, tmp_path: Path):
    copy = StudyFolder.open(shutil.copytree(str(confirmed.path), tmp_path / "copy"))
    first = {run.cell: run for run in minima.best_runs(copy, repeats=1)}
    assert {run.repeat for run in first.values()} == {0}
    gone = first["sgd-b32-none"]
    (Path(str(copy.confirmation.trial_folder(gone))) / "model.pt").unlink()
    assert {run.cell: run.repeat for run in minima.best_runs(copy, repeats=1)} == {
        cell: int(cell == gone.cell) for cell in first
    }
    assert len(minima.best_runs(copy, repeats=2)) == len(minima.best_runs(copy))


def test_one_batch_size_has_nothing_to_interpolate(confirmed: StudyFolder):
    runs = [run for run in minima.best_runs(confirmed) if run.batch_size == 32]
    with pytest.raises(StudyError, match="differ in the batch size alone"):
        minima.landscape_tasks(confirmed, "interpolate", runs, minima.LandscapeSettings())
