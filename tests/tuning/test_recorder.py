"""Taking up a study that was interrupted, without Ray."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import ray

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord, ranked
from lbstudy.study.spec import Cell, Published
from lbstudy.tuning.promotion import promote
from lbstudy.tuning.pruner import StudyPruner
from lbstudy.tuning.recorder import Recorder, take_up
from lbstudy.tuning.search import CellSearch, Past, StudySearch
from tests.conftest import tiny_study

CELL = Cell("sgd", 32, "none")
STUDY = tiny_study(budget={"epochs": 8}, tuning={"trials": 4, "pruner": {"name": "asha", "grace_period": 2, "reduction_factor": 2}})  # fmt: skip
EPOCHS = {cell.name: 8 for cell in STUDY.list_cells()}


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path / "s", STUDY)


def write(folder: StudyFolder, number: int, status: str, accuracies: list[float], checkpoint: int = 0) -> TrialRecord:
    """A trial with these accuracies after its epochs."""
    record = TrialRecord(
        CELL.name, number, "sgd", 32, "none", {"learning_rate": 0.1 + number}, number, {"seed": number}
    )
    record.status = status  # type: ignore[assignment]
    folder.write_trial(record)
    for epoch, accuracy in enumerate(accuracies, start=1):
        record.metrics = {"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0, "seconds": 1.0}
        folder.append_epoch(record, record.metrics)
        if epoch == checkpoint:
            folder.write_state(record, "checkpoint", epoch, b"state")
    if status == "running":
        record.metrics = {}
    folder.write_trial(record)
    return record


def taken(folder: StudyFolder) -> tuple[list[Past], list[str]]:
    notices: list[str] = []
    return take_up(folder, STUDY, notices.append)[0], notices


def test_finished_trials_are_kept_as_they_are(folder: StudyFolder):
    write(folder, 0, "completed", [0.1, 0.2, 0.3])
    write(folder, 1, "diverged", [0.1, 0.5])
    past, notices = taken(folder)
    assert past == [
        Past(CELL, 0, {"learning_rate": 0.1}, "completed", (0.1, 0.2, 0.3)),
        Past(CELL, 1, {"learning_rate": 1.1}, "diverged", (0.1, 0.0)),
    ]
    assert notices == []


@pytest.mark.parametrize("checkpoint", [0, 2, 3])
def test_interrupted_trial_goes_on_from_its_checkpoint(folder: StudyFolder, checkpoint: int):
    record = write(folder, 0, "running", [0.1, 0.2, 0.3], checkpoint)
    past, notices = taken(folder)
    assert past[0].values == (0.1, 0.2, 0.3)[:checkpoint]
    assert len(folder.epochs(record)) == checkpoint
    assert f"it goes on after epoch {checkpoint}" in notices[0]


def test_checkpoint_ahead_of_a_damaged_series_is_not_used(folder: StudyFolder):
    record = write(folder, 0, "running", [0.1, 0.2, 0.3], checkpoint=3)
    series = folder.trial_folder(record) / "epochs.jsonl"
    series.write_bytes(series.read_bytes()[:-5])
    assert taken(folder)[0][0].values == ()


def test_damaged_files_are_named_set_aside_and_run_again(folder: StudyFolder):
    lost, torn = write(folder, 0, "completed", [0.1]), write(folder, 1, "running", [0.1, 0.2], checkpoint=2)
    cut = write(folder, 2, "completed", [0.1, 0.2])
    (folder.trial_folder(lost) / "trial.json").write_text("{")
    (folder.trial_folder(torn) / "checkpoint.pt").write_bytes(b"x")
    (folder.trial_folder(cut) / "epochs.jsonl").write_text("")
    past, notices = taken(folder)
    assert [(t.number, t.status, t.values) for t in past] == [(1, "running", ()), (2, "running", ())]
    assert "trial.json is damaged; set aside as trial.json.damaged" in notices[0]
    assert any("checkpoint.pt is damaged; set aside as checkpoint.pt.damaged" in n for n in notices)
    assert (folder.trial_folder(lost) / "trial.json.damaged").exists()
    assert len(taken(folder)[1]) == 2  # the second time only the two interrupted trials are news


def test_trial_that_was_about_to_be_pruned_is_pruned(folder: StudyFolder):
    write(folder, 0, "completed", [0.5] * 8)
    write(folder, 1, "running", [0.4, 0.4], checkpoint=2)  # below the other one at the rung of epoch 2
    write(folder, 2, "running", [0.6, 0.6], checkpoint=2)
    past, records = take_up(folder, STUDY, print)
    pruner = StudyPruner(STUDY, EPOCHS, past)
    recorder = Recorder(folder, STUDY, EPOCHS, records, lambda record: None)
    settled = recorder.settle_interrupted(past, pruner)
    assert [t.status for t in settled] == ["completed", "pruned", "running"]
    assert [r.status for r in folder.trials()] == ["completed", "pruned", "running"]


def test_a_cell_without_a_completed_trial_trains_its_best_pruned_one_to_the_end(folder: StudyFolder):
    """Which had been ended by what a trial reached that diverged later."""
    write(folder, 0, "pruned", [0.3, 0.9])
    write(folder, 1, "pruned", [0.3, 0.4, 0.4, 0.4])
    write(folder, 2, "pruned", [0.3, 0.4, 0.4, 0.5])
    write(folder, 3, "running", [])
    assert not promote(folder, STUDY, folder.trials(), print)  # which may complete
    write(folder, 3, "diverged", [0.7, 0.8, 0.8, 0.8, 0.8])
    notices: list[str] = []
    assert promote(folder, STUDY, folder.trials(), notices.append)
    assert "of its 4 trials none completed" in notices[0]
    assert "trial 2, pruned after epoch 4" in notices[0]
    assert [r.status for r in folder.trials()] == ["pruned", "pruned", "running", "diverged"]
    assert not promote(folder, STUDY, folder.trials(), print)

    past, records = take_up(folder, STUDY, print)
    pruner = StudyPruner(STUDY, EPOCHS, past)
    settled = Recorder(folder, STUDY, EPOCHS, records, lambda record: None).settle_interrupted(past, pruner)
    assert [(t.status, t.values) for t in settled][2] == ("running", ())
    behind = {"epoch": 4, "objective": 0.5}  # of the 0.8 of the trial that diverged
    for promoted, verdict in ((False, "STOP"), (True, "CONTINUE")):
        trial = SimpleNamespace(config={"cell": CELL.name, "number": 2, "promoted": promoted})
        pruner.on_trial_add(None, trial)
        assert pruner.on_trial_result(None, trial, behind) == verdict
        pruner = StudyPruner(STUDY, EPOCHS, past)


def test_a_cell_with_a_result_or_without_a_pruned_trial_is_left_alone(folder: StudyFolder):
    for number, status in enumerate(["diverged", "failed", "diverged", "diverged"]):
        write(folder, number, status, [0.1])
    assert not promote(folder, STUDY, folder.trials(), print)
    write(folder, 0, "completed", [0.1] * 8)
    write(folder, 1, "pruned", [0.2] * 2)
    assert not promote(folder, STUDY, folder.trials(), print)


def make_search(past: list[Past]) -> tuple[StudySearch, list[tuple[str, int, dict[str, float]]]]:
    begun: list[tuple[str, int, dict[str, float]]] = []

    def begin(trial_id: str, cell: Cell, number: int, params: dict[str, float], published: bool) -> dict[str, object]:
        begun.append((cell.name, number, params))
        return {"cell": cell.name, "number": number}

    storage = optuna.storages.InMemoryStorage()
    return StudySearch(STUDY, storage, past, begin, lambda trial_id: True), begun


def test_search_taken_up_suggests_what_the_uninterrupted_one_does():
    whole, begun = make_search([])
    past: list[Past] = []
    for n in range(10):
        whole.suggest(str(n))
        cell, number, params = begun[-1]
        cut, again = make_search(list(past))  # as if the driver had died before this trial
        cut.suggest("x")
        assert again == [(cell, number, params)]
        value = 0.1 * (n % 7)
        status = "pruned" if n % 3 else "completed"
        whole.on_trial_complete(str(n), {"epoch": 1, "objective": value, "outcome": status})
        its_cell = next(c for c in STUDY.list_cells() if c.name == cell)
        published = any(entry.items() <= params.items() for entry in STUDY.published_params(its_cell))
        past.append(Past(its_cell, number, params, status, (value,), published=published))


def test_published_configurations_that_come_later_are_tried_next():
    """Their numbers have been taken by sampled trials; what was tried is not tried again."""
    first = STUDY.published_params(CELL)
    later = {"learning_rate": 0.123}
    entry = Published.model_validate({"optimizer": "sgd", "batch_size": 32, "smoothing": "none", "params": later})
    study = STUDY.model_copy(update={"published": [*STUDY.published, entry]})
    past = [
        Past(CELL, 0, first[0], "completed", (0.5,), published=True),
        Past(CELL, 1, {"learning_rate": 0.3}, "completed", (0.4,)),
        Past(CELL, 2, {"learning_rate": 0.4}, "pruned", (0.1,)),
    ]
    search = CellSearch(study, CELL, optuna.storages.InMemoryStorage(), past)
    assert search.ask(3) == (later, True)
    params, published = search.ask(4)
    assert not published
    assert params not in (later, first[0])


def test_a_configuration_that_was_published_twice_is_tried_twice_after_an_interruption_too():
    (first, *_) = STUDY.published_params(CELL)
    study = STUDY.model_copy(update={"published": [entry for entry in STUDY.published for _ in range(2)]})
    past = [Past(CELL, 0, first, "completed", (0.5,), published=True)]
    search = CellSearch(study, CELL, optuna.storages.InMemoryStorage(), past)
    assert search.ask(1) == (first, True)
    assert not search.ask(2)[1]


def test_interrupted_trials_come_first_with_their_own_values():
    past = [
        Past(CELL, 0, {"learning_rate": 0.3}, "completed", (0.5,)),
        Past(CELL, 2, {"learning_rate": 0.7}, "running", (0.1,)),
    ]
    search, begun = make_search(past)
    for n in range(15):
        search.suggest(str(n))
    assert begun[0] == (CELL.name, 2, {"learning_rate": 0.7})
    assert sorted(number for cell, number, _ in begun if cell == CELL.name) == [1, 2, 3]
    assert search.suggest("last") is None  # some are running and may yet need another try


def test_failed_trial_is_tried_again_and_the_search_ends_when_all_have_ended():
    search, begun = make_search([])
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    search.suggest("b")
    assert begun[0] == begun[1]
    for n in range(15):
        search.suggest(str(n))
    for trial in ["b", *map(str, range(15))]:
        search.on_trial_complete(trial, {"epoch": 1, "objective": 0.5, "outcome": "completed"})
    assert search.is_done()
    assert search.suggest("end") == "FINISHED"


def test_a_resume_with_other_workers_is_told(folder: StudyFolder):
    record = write(folder, 0, "completed", [0.1, 0.2])
    record.workers = [3]
    folder.write_trial(record)
    assert "trained by 3 workers, what follows will be by 1" in "".join(taken(folder)[1])
    record.workers = [1]
    folder.write_trial(record)
    assert taken(folder)[1] == []


def test_a_record_names_the_workers_that_trained_it(folder: StudyFolder):
    recorder = Recorder(folder, STUDY, EPOCHS, [], lambda record: None)
    recorder.begin("a", CELL, 0, {"learning_rate": 0.1}, False)
    report = {"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0, "seconds": 1.0}
    recorder.on_trial_start(0, [], SimpleNamespace(trial_id="a"))
    for epoch, workers in ((1, 1), (2, 1), (3, 2)):
        machine = {"device": f"{workers} x cpu", "workers": workers, "memory": 1000 * epoch, "device_memory": 0}
        result = {"report": report | {"epoch": epoch}, **machine}
        recorder.on_trial_result(0, [], SimpleNamespace(trial_id="a"), result)
    recorder.write_running()
    assert folder.trials()[0].workers == [1, 2]


@pytest.mark.parametrize(("trials", "share"), [(6, 0.53), (12, 0.45), (20, 0.41), (60, 0.37)])
def test_more_trials_pass_a_rung_than_one_in_the_reduction_factor(trials: int, share: float):
    """The shares that docs/study-file.md states, of trials in random order with a factor of 3."""
    study = tiny_study(tuning={"trials": 4, "pruner": {"name": "asha", "grace_period": 1, "reduction_factor": 3}})
    random, passed = np.random.default_rng(0), []
    for _ in range(2400 // trials):
        pruner = StudyPruner(study, {CELL.name: 3}, [])
        past = [Past(CELL, number, {}, "running", (value,)) for number, value in enumerate(random.random(trials))]
        passed += [not pruner.replay(trial) for trial in past]
    assert np.mean(passed) == pytest.approx(share, abs=0.03)


def reported(epoch: int, seconds: float = 2.0, **brought: object) -> dict[str, object]:
    report = {"epoch": epoch, "val_accuracy": 0.5, "val_loss": 1.0, "seconds": seconds}
    machine = {"device": "1 x cpu", "workers": 1, "memory": 1000, "device_memory": 0}
    return {"report": report, **machine, **brought}


def failed(lane: str | None, **more: object) -> dict[str, object]:
    ending = {"outcome": "failed", "report": {"error": "the lane's worker group has ended"}, "done": True}
    return ending | ({"lane": lane} if lane else {}) | more


class Told:
    """A recorder that is told by Tune of one trial, try after try."""

    def __init__(self, folder: StudyFolder, monkeypatch: pytest.MonkeyPatch):
        self.now, self._folder, self._tries = 100.0, folder, 0
        monkeypatch.setattr("lbstudy.tuning.recorder.time.monotonic", lambda: self.now)
        self.recorder = Recorder(folder, STUDY, EPOCHS, [], lambda record: None)

    def run(self, *results: dict[str, object], error: bool = False) -> bool:
        """A try of the trial; returns whether it gets another."""
        self._tries += 1
        trial = SimpleNamespace(trial_id=str(self._tries), last_result=None, error_file=None, metric_analysis={}, metric_n_steps={})  # fmt: skip
        self.recorder.begin(trial.trial_id, CELL, 0, {"learning_rate": 0.1}, False)
        self.recorder.on_trial_start(0, [], trial)
        for result in results:
            self.now += 10
            trial.last_result = dict(result)
            self.recorder.on_trial_result(0, [], trial, dict(result))
        ended_badly = error or results[-1].get("outcome") == "failed"
        again = ended_badly and self.recorder.try_again(trial.trial_id)
        (self.recorder.on_trial_error if error else self.recorder.on_trial_complete)(0, [], trial)
        return again

    @property
    def record(self) -> TrialRecord:
        return self._folder.trials()[0]


@pytest.fixture
def told(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr("lbstudy.tuning.recorder.ray.put", lambda state: state)
    monkeypatch.setattr("lbstudy.tuning.recorder.ray.get", lambda state, timeout: state)
    return Told(folder, monkeypatch)


def test_a_node_that_goes_costs_its_epochs_and_no_retry(told: Told):
    nodes, saved = {"nodes": ["n1"]}, {"checkpoint": [b"state"]}
    epochs = [reported(1), reported(2, **saved), reported(3), reported(4, seconds=3.0)]
    for _ in range(2 + STUDY.resources.max_failures):
        assert told.run(nodes, *epochs, failed("moved", gone=["n1"]))
        epochs = [reported(3), reported(4, seconds=3.0)]
    told.run({"nodes": ["n2"]}, reported(3), reported(4))
    record = told.record
    assert (record.failures, record.epochs, record.nodes) == (0, 4, ["n1", "n2"])
    assert len(record.moves) == 2 + STUDY.resources.max_failures
    assert record.moves[0] | {"at": ""} == {"at": "", "gone": ["n1"], "epochs": 2, "seconds": 5.0 + 10.0}
    assert record.lost == 15.0 * len(record.moves)
    assert record.seconds == 8.0  # of its four epochs


def test_a_checkpoint_that_does_not_come_is_given_up_and_the_one_before_stays(
    told: Told, folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
):
    waited = []

    def get(state: bytes, timeout: float) -> bytes:
        if state != b"lost":
            return state
        waited.append(timeout)
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr("lbstudy.tuning.recorder.ray.get", get)
    lost = reported(2, checkpoint=[b"lost"])
    told.run({"nodes": ["n1"]}, reported(1, checkpoint=[b"state"]), lost, failed("moved", gone=["n1"]))
    assert waited == [120]
    assert folder.read_state(told.record, "checkpoint") == (1, b"state")
    assert told.record.moves[0]["epochs"] == 1  # it goes on from there


def test_a_trial_that_fails_by_itself_has_its_retries(told: Told):
    tries = [told.run({"nodes": ["n1"]}, reported(1), error=True) for _ in range(STUDY.resources.max_failures + 1)]
    assert tries == [True] * STUDY.resources.max_failures + [False]
    record = told.record
    assert (record.status, record.failures, record.moves) == ("failed", len(tries), [])
    assert record.lost == 2.0 * STUDY.resources.max_failures  # the last try's epoch stays


@pytest.mark.parametrize("lane", ["waits", "broken"])
def test_a_lane_that_does_not_come_up_is_no_failure_of_the_trial(told: Told, lane: str):
    for _ in range(2 + STUDY.resources.max_failures):
        assert told.run(failed(lane))
    record = told.record
    assert (record.status, record.failures, record.moves, record.lost) == ("running", 0, [], 0.0)
    assert record.error == "the lane's worker group has ended"


def test_trials_that_have_ended_fill_the_rungs_as_they_did_when_they_reported():
    study = tiny_study(tuning={"trials": 40, "pruner": {"name": "asha", "grace_period": 1, "reduction_factor": 2}})
    random = np.random.default_rng(0)
    past = [Past(CELL, n, {}, "completed", tuple(random.random(1 + n % 9))) for n in range(40)]
    entered, reported_one_by_one = (StudyPruner(study, {CELL.name: 8}, []) for _ in range(2))
    for trial in past:
        assert not entered.replay(trial)
        reported_one_by_one.replay(replace(trial, status="running"))
    rungs, expected = (p._cells[CELL.name]._brackets[0]._rungs for p in (entered, reported_one_by_one))
    assert rungs == expected
    assert [len(recorded) for _, recorded in rungs] == [0, 25, 35, 40]
    following = Past(CELL, 40, {}, "running", (0.4, 0.5, 0.6, 0.7))
    assert entered.replay(following) == reported_one_by_one.replay(following)


def test_of_a_cell_the_best_models_stay_and_each_is_removed_once(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch):
    study = tiny_study(budget={"epochs": 1}, tuning={"trials": 20, "pruner": "none"}, resources={"keep_best": 2})
    monkeypatch.setattr("lbstudy.tuning.recorder._fetch", lambda reference: reference and reference[0])
    before = write(folder, 0, "completed", [0.45])
    folder.write_state(before, "model", 1, b"left by a driver that died")
    records = folder.trials()
    removed: list[str] = []
    drop_state = StudyFolder.drop_state

    def drop(self: StudyFolder, record: TrialRecord, name: str, **more: object) -> None:
        removed.extend([f"{record.number}"] * (name == "model"))
        drop_state(self, record, name, **more)

    monkeypatch.setattr(StudyFolder, "drop_state", drop)
    recorder = Recorder(folder, study, {CELL.name: 1}, records, lambda record: None)
    for number, accuracy in enumerate([0.4, 0.5, 0.5, 0.3, 0.6, 0.1], start=1):
        trial = SimpleNamespace(trial_id=str(number), last_result={}, metric_analysis={}, metric_n_steps={})
        recorder.begin(trial.trial_id, CELL, number, {"learning_rate": 0.1}, False)
        recorder.on_trial_start(0, [], trial)
        result = reported(1, outcome="completed", model=[b"%d" % number])
        result["report"] = {**result["report"], "val_accuracy": accuracy}
        recorder.on_trial_result(0, [], trial, result)
        recorder.on_trial_complete(0, [], trial)
        kept = {r.number for r in folder.trials() if folder.read_state(r, "model")}
        assert kept == {r.number for r in ranked(folder.trials(), study)[:2]}
    assert kept == {2, 5}
    assert removed == ["1", "0", "3"]
