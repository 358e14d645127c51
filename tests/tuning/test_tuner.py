"""A study on Ray: what is tried, pruned, recorded; and that a trial in a warm lane is the trial in a fresh process."""

import dataclasses
import os
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lbstudy.analysis.tables import best as tables
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.file import StudyError
from lbstudy.study.run import RunSpec
from lbstudy.study.spec import Resources
from lbstudy.training import datasets
from lbstudy.training.data import place
from lbstudy.training.train import train
from lbstudy.tuning import tuner
from lbstudy.tuning.lane import LaneBroken, LaneError, LaneWaits, first_cause, process_group_backend
from lbstudy.tuning.resources import count_lanes, this_machine, with_gpus
from lbstudy.tuning.tuner import TrialActor, cluster_nodes, connect
from tests.conftest import RanStudy, run_tiny, tiny_study

EPOCHS = 4


@pytest.fixture
def records(ran_study: RanStudy) -> list[TrialRecord]:
    return ran_study.folder.trials()


def test_every_cell_gets_its_trials_and_each_ends_somehow(records: list[TrialRecord]):
    assert Counter(r.cell for r in records) == dict.fromkeys(
        ["sgd-b32-none", "sgd-b32-mixup+noise", "sgd-b128-none", "sgd-b128-mixup+noise"], 4
    )
    statuses = Counter(r.status for r in records)
    assert set(statuses) == {"completed", "pruned", "diverged"}
    assert all(r.number == n % 4 for n, r in enumerate(records))


def test_published_configurations_come_first(records: list[TrialRecord]):
    first = {r.cell: r for r in records if r.number == 0}
    assert first["sgd-b32-none"].params == {"learning_rate": 0.05}
    assert first["sgd-b32-mixup+noise"].params["learning_rate"] == 0.06  # and alpha and magnitude left to the sampler
    assert set(first["sgd-b32-mixup+noise"].params) == {"learning_rate", "mixup_alpha", "noise_magnitude"}
    assert [r.published for r in records if r.cell == "sgd-b128-none"] == [True, True, False, False]


def test_pruned_trials_end_at_rungs_and_the_others_do_not(ran_study: RanStudy, records: list[TrialRecord]):
    for record in records:
        series = ran_study.folder.epochs(record)
        assert [entry["epoch"] for entry in series] == list(range(1, record.epochs + 1))
        assert series[-1] == record.metrics
        if record.status == "pruned":
            assert record.epochs in (1, 2)
        if record.status == "completed":
            assert record.epochs == EPOCHS


def test_models_leave_the_object_store_with_their_trials(ran_study: RanStudy):
    assert Counter(ran_study.shown)["completed"] > ran_study.lanes + 1
    assert ran_study.models <= ran_study.lanes  # of trials whose end Tune has not dealt with yet


def test_diverged_trial_is_a_result(records: list[TrialRecord]):
    diverged = next(r for r in records if r.cell == "sgd-b128-none" and r.number == 1)
    assert diverged.params == {"learning_rate": 1e6}
    assert diverged.status == "diverged"
    assert diverged.metrics["val_loss"] is None or diverged.metrics["train_loss"] is None


def test_cells_take_turns(records: list[TrialRecord]):
    by_start = sorted(records, key=lambda r: r.started)
    assert len({r.cell for r in by_start[:4]}) == 4
    assert max(r.number for r in by_start[:8]) <= 2


def test_trial_in_a_warm_lane_is_the_trial_in_a_fresh_process(records: list[TrialRecord]):
    completed = [r for r in records if r.status == "completed"]
    assert {r.smoothing for r in completed} == {"none", "mixup+noise"}
    for record in completed:
        run = RunSpec.model_validate(record.run)
        data = place(datasets.load(run.dataset), run.dataset, run.split_seed)
        assert train(run, data).fingerprint == record.fingerprint


def test_optuna_knows_how_each_trial_ended(ran_study: RanStudy, records: list[TrialRecord]):
    storage = JournalStorage(JournalFileBackend(str(ran_study.folder.journal)))
    states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.COMPLETE}
    for cell in {r.cell for r in records}:
        trials = optuna.load_study(study_name=cell, storage=storage).trials
        assert len(trials) == 4
        for record, trial in zip((r for r in records if r.cell == cell), trials, strict=True):
            assert trial.params == record.params
            assert trial.state == states[record.status]
            assert len(trial.intermediate_values) == record.epochs
            if record.status == "diverged":
                assert trial.value == 0.0


def test_records_are_shown_and_no_lane_folder_stays(ran_study: RanStudy):
    assert set(ran_study.shown) == {"running", "completed", "pruned", "diverged"}
    assert sorted(p.name for p in ran_study.folder.path.iterdir()) == [
        "environment.json", "optuna.journal", "study.yaml", "trials",
    ]  # fmt: skip


def test_table_of_a_real_study(ran_study: RanStudy):
    configs = tables.best_configs(ran_study.folder)
    assert configs["trials"].tolist() == [4] * 4
    small = configs[(configs["batch_size"] == 32) & (configs["smoothing"] == "none")].iloc[0]
    assert small["val_accuracy"] > 0.7


@pytest.mark.long
def test_a_cell_without_a_result_gets_one(ran_study: RanStudy, tmp_path: Path):
    """As if all that completed in a cell with pruned trials had failed at last: one of these is trained to its end."""
    shutil.copytree(str(ran_study.folder.path), tmp_path / "tiny")
    folder = StudyFolder.open(tmp_path / "tiny")
    trials = folder.trials()
    cell = next(r.cell for r in trials if r.status == "pruned")
    for record in (r for r in trials if r.cell == cell and r.status == "completed"):
        record.status = "failed"
        folder.write_trial(record)
    before = {r.number: folder.epochs(r) for r in trials if r.cell == cell and r.status == "pruned"}
    run_tiny(tmp_path / "tiny", folder.study())
    (record,) = (r for r in folder.trials() if r.cell == cell and r.status == "completed")
    assert record.promoted
    assert record.epochs == EPOCHS
    for old, new in zip(before[record.number], folder.epochs(record), strict=False):
        assert (old["train_loss"], old["val_accuracy"]) == (new["train_loss"], new["val_accuracy"])


@pytest.mark.slow
def test_study_run_twice_with_one_lane_gives_the_same_table(ray_session: None, tmp_path: Path):
    study = tiny_study(resources={"cpus_per_worker": 2})
    one, two = (run_tiny(tmp_path / str(n), study) for n in (1, 2))
    assert one.lanes == 1
    assert tables.best_configs(one.folder).equals(tables.best_configs(two.folder))
    timing = {"started": "", "seconds": 0.0, "metrics": {}}
    assert [dataclasses.replace(r, **timing) for r in one.folder.trials()] == [
        dataclasses.replace(r, **timing) for r in two.folder.trials()
    ]


@pytest.mark.slow
def test_two_workers_find_what_one_finds(ray_session: None, tmp_path: Path):
    precise = {"precision": "fp64", "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]}}
    precise["published"] = []
    one = run_tiny(tmp_path / "1", tiny_study(resources={"cpus_per_worker": 2}, **precise))
    two = run_tiny(tmp_path / "2", tiny_study(resources={"workers": 2}, **precise))
    for a, b in zip(one.folder.trials(), two.folder.trials(), strict=True):
        assert (a.params, a.status, a.epochs) == (b.params, b.status, b.epochs)
        if a.status != "diverged":
            assert a.metrics["val_loss"] == pytest.approx(b.metrics["val_loss"], abs=1e-6)
    assert two.folder.trials()[0].device == "2 x cpu"


LANES = {
    "one node": ({}, [{"CPU": 8}], 8),
    "workers of one trial may sit on several nodes": ({"workers": 3}, [{"CPU": 2}, {"CPU": 2}], 1),
    "whole workers only": ({"cpus_per_worker": 3}, [{"CPU": 8}, {"CPU": 8}], 4),
    "fractions of a GPU": ({"gpus_per_worker": 0.25}, [{"CPU": 16, "GPU": 2}], 8),
    "CPUs bind too": ({"gpus_per_worker": 0.25, "cpus_per_worker": 4}, [{"CPU": 16, "GPU": 2}], 4),
    "a head without CPUs": ({}, [{}, {"CPU": 2}], 2),
}


@pytest.mark.parametrize("case", LANES)
def test_lanes_follow_from_resources(case: str):
    resources, nodes, lanes = LANES[case]
    assert count_lanes(Resources.model_validate({"gpus_per_worker": 0, **resources}), nodes) == lanes


IMPOSSIBLE = {
    "CPUs of a worker": ({"cpus_per_worker": 9}, [{"CPU": 8}, {"CPU": 8}], "a worker needs 9 CPU, but the most .* is 8 CPU"),
    "no GPU": ({"gpus_per_worker": 1}, [{"CPU": 8}], "1 CPU and 1 GPU, but .* 8 CPU and 0 GPU"),
    "too many workers": ({"workers": 9}, [{"CPU": 8}], "needs 9 workers of 1 CPU each, but the cluster has room for 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_resources_say_what_is_missing(case: str):
    resources, nodes, message = IMPOSSIBLE[case]
    with pytest.raises(StudyError, match=message):
        count_lanes(Resources.model_validate({"gpus_per_worker": 0, **resources}), nodes)


def test_gpus_are_used_where_there_are_any():
    assert with_gpus(Resources(), [{"CPU": 8}]).gpus_per_worker == 0
    assert with_gpus(Resources(), [{"CPU": 8}, {"GPU": 4}]).gpus_per_worker == 1
    assert with_gpus(Resources(gpus_per_worker=0.5), [{"CPU": 8}]).gpus_per_worker == 0.5


def test_workers_that_share_a_gpu_use_gloo():
    assert process_group_backend(Resources(workers=2, gpus_per_worker=0.5)) == "gloo"
    assert process_group_backend(Resources(workers=2, gpus_per_worker=1)) is None
    assert process_group_backend(Resources(workers=1, gpus_per_worker=0.5)) is None


def test_nodes_that_an_autoscaler_may_add_count(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bootstrap = tmp_path / "ray_bootstrap_config.yaml"
    bootstrap.write_text(
        "max_workers: 3\nhead_node_type: head\navailable_node_types:\n"
        "  head: {resources: {CPU: 0}}\n"
        "  big: {resources: {CPU: 64, GPU: 8}, max_workers: 2}\n  small: {resources: {CPU: 8}, max_workers: 9}\n"
    )
    assert len(cluster_nodes(bootstrap)) == 1  # a private Ray has no autoscaler
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_nodes(bootstrap)[1:] == [{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8}, {"CPU": 8}]


def test_a_temporary_folder_that_is_too_deep_for_sockets_is_named(no_shutdown: None, monkeypatch: pytest.MonkeyPatch):
    def fail(**options: object) -> None:
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/ray/...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/long")
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(StudyError, match=r"temporary folder, /long \(TMPDIR\); set RAY_TMPDIR to a shorter one"):
        connect()


def test_ray_that_does_not_start_is_one_error(no_shutdown: None, monkeypatch: pytest.MonkeyPatch):
    def fail(**options: object) -> None:
        raise Exception("The last 20 lines of dashboard.log\nno room for another process")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(StudyError, match="^Ray did not start on this machine: no room for another process$"):
        connect()


class FakeLane:
    """Does what a test says."""

    def __init__(self, raises: Exception | None = None, gone: Sequence[str] = (), **report: Any):
        self._raises, self._gone, self._report = raises, list(gone), report

    def come_up(self) -> list[str]:
        if isinstance(self._raises, LaneWaits | LaneBroken):
            raise self._raises
        return ["n1"]

    def next_report(self, timeout: float) -> dict[str, Any]:
        if self._raises:
            raise self._raises
        return dict(self._report)

    def gone(self) -> list[str]:
        return self._gone


def last_result(workers: int, lane: FakeLane) -> dict[str, Any]:
    """What Tune is told of a trial in a lane that ends it."""
    actor: Any = TrialActor.__new__(TrialActor)
    actor._lane, actor._begun, actor._resources = lane, False, Resources(workers=workers)
    result = actor.step()
    if "nodes" in result:
        assert result == {"nodes": ["n1"]}
        result = actor.step()
    return result


LOST = {"outcome": "failed", "error": "Connection closed by peer"}
ENDS = {
    "no resources": (1, FakeLane(LaneWaits("x")), "waits"),
    "a package is missing": (1, FakeLane(LaneBroken("x")), "broken"),
    "the node went while the workers came up": (1, FakeLane(LaneBroken("x"), ["n1"]), "moved"),
    "the node went with all workers": (1, FakeLane(LaneError("x"), ["n1"]), "moved"),
    "the node went with one of two workers, which the other one reports": (2, FakeLane(gone=["n2"], **LOST), "moved"),
    "one of two workers fails": (2, FakeLane(**LOST), None),
    "a trial fails, and its node goes afterwards": (1, FakeLane(gone=["n1"], **LOST), None),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_ends_a_trial_is_told_apart(case: str):
    workers, lane, reason = ENDS[case]
    result = last_result(workers, lane)
    assert (result["outcome"], result["done"], result.get("lane")) == ("failed", True, reason)
    assert result.get("gone", []) == (lane.gone() if reason == "moved" else [])


def test_workers_that_die_on_a_node_that_stays_are_a_failure():
    with pytest.raises(LaneError):
        last_result(1, FakeLane(LaneError("x")))


def test_the_root_of_an_error_comes_first():
    text = "Training failed due to controller error:\nray::RayTrainWorker\n  File x\nModuleNotFoundError: No module named 'torch'"
    assert first_cause(RuntimeError(text)).splitlines()[0] == "ModuleNotFoundError: No module named 'torch'"
    assert first_cause(None) == "without an error"


def test_a_cluster_that_is_coming_up_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    study = tiny_study(resources={"workers": 2, "wait_minutes": 1})
    seen, said, now = [[{"CPU": 0.0}], [{"CPU": 1.0}], [{"CPU": 1.0}], [{"CPU": 1.0}, {"CPU": 1.0}]], list[str](), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(tuner, "time", clock)
    monkeypatch.setattr(tuner, "cluster_nodes", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    data = datasets.load_all(study)
    assert tuner.plan_when_there_is_room(study, data, said.append).lanes == 1
    assert [line.split(": ", 1)[1] for line in said] == [
        "resources: a worker needs 1 CPU, but the most that a node has is 0 CPU",
        "resources.workers: a trial needs 2 workers of 1 CPU each, but the cluster has room for 1",
    ]
    assert said[0].startswith("waiting for nodes, up to 1 min (resources.wait_minutes)")
    seen[:] = [[{"CPU": 1.0}]]
    began = now
    with pytest.raises(StudyError, match=r"has room for 1; given up after 1 min \(resources.wait_minutes\)$"):
        tuner.plan_when_there_is_room(study, data, said.append)
    assert now - began == 60
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(StudyError, match="has room for 1$"):  # this machine will not grow
        tuner.plan_when_there_is_room(study, data, said.append)
    assert now - began == 60


def test_the_cpus_that_a_process_may_use_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert this_machine()["CPU"] == 1


def test_a_cluster_that_is_there_answers(ray_session: None):
    tuner._require_answer(ray.get_runtime_context().gcs_address)


def test_a_cluster_that_is_not_there_is_one_error_at_once(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed}")
    with pytest.raises(StudyError, match=rf"^no Ray cluster answers at [\d.]+:{closed}: Connection refused$"):
        connect()
