"""A study that is tuned for a target: who is ended when, what goes on after an interruption, what is confirmed. No Ray."""

from math import log10
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.tables import best as tables
from lbstudy.methods import configure
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord, ranked
from lbstudy.study.objective import objective, time_so_far
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.tuning import confirm
from lbstudy.tuning.pruner import StudyPruner
from lbstudy.tuning.recorder import Recorder, take_up
from lbstudy.tuning.search import CellSearch, Past
from tests.conftest import tiny_study

CELL = Cell("sgd", 32, "none")
ASHA = {"name": "asha", "grace_period": 2, "reduction_factor": 2}


def study_for(pruner: object = "none", metric: str = "steps_to_target", **changes: object) -> StudySpec:
    tuning = {"trials": 6, "metric": metric, "target": {"val_accuracy": 0.7}, "pruner": pruner}
    return tiny_study(budget={"epochs": 8}, tuning=tuning, **changes)


STUDY = study_for()
EPOCHS = {cell.name: 8 for cell in STUDY.list_cells()}


def reports(*accuracies: float, hit: bool = False) -> list[dict[str, Any]]:
    """Of epochs of ten steps and a second; a hit comes three steps into the last one."""
    found: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        last = hit and epoch == len(accuracies)
        step = 10 * epoch - 7 * last
        report = {
            "epoch": epoch, "step": step, "val_accuracy": accuracy, "val_loss": 1.0, "seconds": 1.0,
            "run_seconds": float(epoch), "nearest": max(accuracies[:epoch]), "within": [{"step": step - 1, "epochs": 0.5,
            "seconds": 0.5, "val_loss": 1.0, "val_accuracy": 0.1}],
        }  # fmt: skip
        if last:
            report |= {"steps_to_target": step, "epochs_to_target": step / 10, "seconds_to_target": float(epoch)}
        found.append(report)
    return found


def past(number: int, series: list[dict[str, Any]], status: str, study: StudySpec = STUDY) -> Past:
    values = tuple(objective(study.tuning, entry, None) for entry in series)
    return Past(CELL, number, {"learning_rate": 0.1 + number}, status, values, time_so_far(study.tuning, series[-1]))


def result(series: list[dict[str, Any]], study: StudySpec = STUDY) -> dict[str, Any]:
    report = series[-1]
    return {
        "epoch": report["epoch"], "objective": objective(study.tuning, report, None),
        "elapsed": time_so_far(study.tuning, report),
    }  # fmt: skip


def trial(number: int) -> Any:
    return SimpleNamespace(config={"cell": CELL.name, "number": number})


HIT = reports(0.3, 0.5, 0.72, hit=True)  # after 23 steps


class TestPruner:
    def test_a_trial_that_cannot_win_any_more_is_ended(self):
        pruner = StudyPruner(STUDY, EPOCHS, [])
        pruner.on_trial_add(None, trial(0))
        slow = reports(0.1, 0.2, 0.3)
        assert [pruner.on_trial_result(None, trial(0), result(slow[:n])) for n in (1, 2, 3)] == ["CONTINUE"] * 3
        pruner.on_trial_add(None, trial(1))
        pruner.on_trial_complete(None, trial(1), result(HIT))
        assert pruner.on_trial_result(None, trial(0), result(slow[:2])) == "CONTINUE"  # 20 steps, it may still
        assert pruner.on_trial_result(None, trial(0), result(slow)) == "STOP"  # 30 steps
        other = SimpleNamespace(config={"cell": "sgd-b128-none", "number": 0})
        assert pruner.on_trial_result(None, other, result(slow)) == "CONTINUE"

    def test_a_miss_ends_nobody(self):
        pruner = StudyPruner(STUDY, EPOCHS, [past(0, reports(*[0.6] * 8), "completed")])
        assert pruner.on_trial_result(None, trial(1), result(reports(*[0.1] * 7))) == "CONTINUE"

    def test_it_is_rebuilt_from_the_records(self):
        pruner = StudyPruner(STUDY, EPOCHS, [past(0, HIT, "completed")])
        assert pruner.replay(past(1, reports(0.1, 0.2, 0.3), "running"))
        assert not pruner.replay(past(1, reports(0.1, 0.2), "running"))
        assert not pruner.replay(past(1, reports(0.6, 0.6, 0.9, hit=True), "completed"))

    def test_hits_count_at_the_rungs_that_they_did_not_need(self):
        """Rungs at epochs 2 and 4, half may pass: behind two hits the nearest of those that run are not enough."""
        study = study_for(ASHA)
        late = reports(*[0.1] * 6, 0.7, hit=True)  # later than what is to come, so that nothing is beaten by time
        quick = [past(number, late, "completed", study) for number in (0, 1)]
        pruner = StudyPruner(study, EPOCHS, quick)
        pruner.on_trial_add(None, trial(2))
        near = reports(0.6, 0.65, 0.66, 0.69)
        alone = StudyPruner(study, EPOCHS, [])
        alone.on_trial_add(None, trial(2))
        assert [alone.on_trial_result(None, trial(2), result(near[:n])) for n in (2, 4)] == ["CONTINUE"] * 2
        soon = StudyPruner(study, EPOCHS, [past(n, reports(0.7, hit=True), "completed", study) for n in (0, 1)])
        soon._best.clear()  # by rungs alone
        soon.on_trial_add(None, trial(2))
        assert soon.on_trial_result(None, trial(2), result(near[:2])) == "STOP"

    def test_rungs_compare_by_how_near_trials_have_come(self):
        study = study_for(ASHA)
        pruner = StudyPruner(study, EPOCHS, [])
        for number, (accuracies, verdict) in enumerate(
            [((0.5, 0.2), "CONTINUE"), ((0.3, 0.4), "STOP"), ((0.1, 0.6), "CONTINUE")]
        ):
            pruner.on_trial_add(None, trial(number))
            assert pruner.on_trial_result(None, trial(number), result(reports(*accuracies))) == verdict


def test_a_study_for_accuracy_ends_nobody_by_time():
    study = tiny_study(budget={"epochs": 8}, tuning={"trials": 4})
    assert study.tuning.verdicts(8) == []
    assert STUDY.tuning.verdicts(8) == [1, 2, 3, 4, 5, 6, 7]
    pruner = StudyPruner(study, EPOCHS, [Past(CELL, 0, {}, "completed", (0.9,))])
    assert pruner.on_trial_result(None, trial(1), {"epoch": 7, "objective": 0.1}) == "CONTINUE"


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path / "s", STUDY)


def write(
    folder: StudyFolder, number: int, status: str, series: list[dict[str, Any]], checkpoint: int = 0
) -> TrialRecord:
    """A trial, as the recorder leaves it."""
    recorder = Recorder(folder, STUDY, EPOCHS, [], lambda record: None)
    recorder.begin("t", CELL, number, {"learning_rate": 0.01 * (1 + number)}, False)
    task = SimpleNamespace(trial_id="t", last_result={}, metric_analysis={}, metric_n_steps={})
    recorder.on_trial_start(0, [], task)
    for entry in series:
        told: dict[str, Any] = {"report": dict(entry), "device": "cpu", "workers": 1, "memory": 0, "device_memory": 0}
        if entry is series[-1] and status != "running":
            told["outcome"] = status
        recorder.on_trial_result(0, [], task, told)
        if entry["epoch"] == checkpoint:
            record = next(r for r in [recorder._known[CELL.name, number]])
            folder.write_state(record, "checkpoint", checkpoint, b"state")
    recorder.write_running() if status == "running" else recorder.on_trial_complete(0, [], task)
    return next(r for r in folder.trials() if r.number == number)


def test_records_keep_the_hit_and_the_series_what_was_found_within(folder: StudyFolder):
    record = write(folder, 0, "completed", HIT)
    assert (record.metrics["steps_to_target"], record.metrics["epochs_to_target"]) == (23, 2.3)
    assert record.metrics["seconds_to_target"] == 3
    assert "within" not in record.metrics
    assert [entry["within"][0]["step"] for entry in folder.epochs(record)] == [9, 19, 22]
    assert record.run["target"]["val_accuracy"] == 0.7
    assert record.run["until_target"]


def test_an_interrupted_trial_is_taken_up_with_how_near_it_came(folder: StudyFolder):
    write(folder, 0, "completed", HIT)
    write(folder, 1, "running", reports(0.6, 0.2, 0.3), checkpoint=2)
    (done, cut), records = take_up(folder, STUDY, lambda message: None)
    assert done.values[-1] == log10(23)
    assert cut.values == (9 + (1 - 0.6 / 0.7),) * 2
    assert cut.elapsed == log10(20)
    assert "within" not in records[1].metrics
    pruner = StudyPruner(STUDY, EPOCHS, [done, cut])
    recorder = Recorder(folder, STUDY, EPOCHS, records, lambda record: None)
    assert [p.status for p in recorder.settle_interrupted([done, cut], pruner)] == ["completed", "running"]
    begun = recorder.begin("x", CELL, 1, {}, False)
    assert begun["rungs"] == [1, 2, 3, 4, 5, 6, 7]


def test_hits_come_first_then_near_misses(folder: StudyFolder):
    write(folder, 0, "completed", reports(*[0.5] * 8))
    write(folder, 1, "completed", reports(*[0.1] * 7, 0.8, hit=True))
    write(folder, 2, "completed", HIT)
    write(folder, 3, "completed", reports(0.69, *[0.1] * 7))
    write(folder, 4, "diverged", reports(0.69))
    best_first = [record.number for record in ranked(folder.trials(), STUDY)]
    assert best_first == [2, 1, 3, 0]
    frame = load.ranked(STUDY, load.trials(folder))
    assert frame["number"].tolist() == best_first
    row = tables.best_configs(folder).iloc[0]
    assert (row["steps_to_target"], row["reached"], row["epochs"]) == (23, "yes", 3)
    assert tables.progress(folder).iloc[0]["best steps_to_target"] == 23


def test_a_cell_without_a_hit_is_best_by_its_nearest_miss(folder: StudyFolder):
    write(folder, 0, "completed", reports(*[0.5] * 8))
    write(folder, 1, "completed", reports(0.69, *[0.1] * 7))
    row = tables.best_configs(folder).iloc[0]
    assert (row["learning_rate"], row["steps_to_target"], row["reached"]) == (0.02, float("inf"), "no")
    shown = tables.for_terminal(tables.best_configs(folder))
    assert shown.iloc[0]["steps_to_target"] == "inf"


def test_search_takes_the_best_from_hits_and_misses_not_from_diverged_trials():
    def best(*trials: Past) -> dict[str, float]:
        return CellSearch(STUDY, CELL, optuna.storages.InMemoryStorage(), trials).best_params()

    miss, hit = past(0, reports(0.5), "completed"), past(1, HIT, "completed")
    lost = Past(CELL, 2, {"learning_rate": 2.1}, "diverged", (objective(STUDY.tuning, {}, "diverged"),))
    assert best(miss, hit, lost) == {"learning_rate": 1.1}
    assert best(miss, lost) == {"learning_rate": 0.1}
    assert best(lost) == {}


def test_confirmed_runs_train_past_the_target(folder: StudyFolder):
    write(folder, 0, "completed", HIT)
    runs = confirm.plan_runs(folder, STUDY, 2, 1, False, "split", lambda message: None)
    assert len(runs) == 2
    run = runs[0].run
    assert (run["target"]["val_accuracy"], run["until_target"], run["evaluate"]) == (0.7, False, "all")
    as_study = confirm.as_study(STUDY, runs)
    assert as_study.tuning.verdicts(8) == []
    StudyPruner(as_study, EPOCHS, []).on_trial_result(None, trial(0), {"epoch": 1, "objective": 0.5})
    plain = configure.run_spec(tiny_study(), CELL, {"learning_rate": 0.1}, 0)
    assert (plain.target, plain.until_target, plain.evaluate_every) == (None, False, None)
