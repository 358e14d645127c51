"""Fixtures shared by the suite: one private Ray, and one small study run on it."""

import gc
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from lbstudy.console.interrupt import SIGNALS
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.study.spec import StudySpec

torch.set_num_threads(1)  # as in a Ray worker with one CPU; sums over threads would change the last bits


class ByFile(LoadFileScheduling):
    """Which of the processes that share the tests runs which: a file in one, and all that needs Ray in one, so that
    there is one Ray and one study that was run on it."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(super()._split_scope(nodeid))
        needs_ray = file.parts[:2] == ("tests", "tuning") or file.name in ("test_whole.py", "test_storage.py")
        return "Ray" if needs_ray else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """The hook of xdist; it is asked for where there are several processes."""
    return ByFile(config, log)


TINY_STUDY = {
    "name": "tiny",
    "model": "lenet5",
    "dataset": {"name": "digits", "validation_size": 0.2, "augment": ["crop"]},
    "budget": {"epochs": 4},
    "cells": {"optimizer": ["sgd"], "batch_size": [32, 128], "smoothing": ["none", "mixup+noise"]},
    "search": {
        "learning_rate": {"log_uniform": [1e-3, 1e6]},  # its upper end is there for diverged trials
        "mixup_alpha": {"uniform": [0.1, 1], "when": {"smoothing": "mixup"}},
        "noise_magnitude": {"log_uniform": [1e-3, 1e-1], "when": {"smoothing": "noise"}},
    },
    "published": [
        {"optimizer": "sgd", "batch_size": 32, "smoothing": "none", "params": {"learning_rate": 0.05}},
        {"optimizer": "sgd", "batch_size": 32, "smoothing": "mixup+noise", "params": {"learning_rate": 0.06}},
        {"optimizer": "sgd", "batch_size": 128, "smoothing": "none", "params": {"learning_rate": 0.05}},
        {"optimizer": "sgd", "batch_size": 128, "smoothing": "none", "params": {"learning_rate": 1e6}},
    ],
    "tuning": {"trials": 4, "startup_trials": 2, "pruner": {"name": "asha", "grace_period": 1, "reduction_factor": 2}},
    "resources": {"cpus_per_worker": 1},
}


def tiny_study(**changes: object) -> StudySpec:
    return StudySpec.model_validate({**TINY_STUDY, **changes})


@dataclass
class RanStudy:
    """A finished study, and what was shown while it ran."""

    folder: StudyFolder
    lanes: int
    shown: list[str] = field(default_factory=list)  # statuses
    notices: list[str] = field(default_factory=list)
    models: int = 0  # in the object store, that the driver still refers to when the last trial has ended


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray for all tests that need one."""
    from lbstudy.tuning import tuner

    tuner.connect()
    yield
    tuner.disconnect()


@pytest.fixture
def handlers() -> Iterator[None]:
    """For a test that changes what signals do: afterwards they do what they did. A signal that has come leaves handlers
    for a second one, which would end the suite."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test whose Ray does not start: what cleans up after it would end the session's."""
    monkeypatch.setattr("ray.shutdown", lambda: None)


@pytest.fixture(scope="session")
def ran_study(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> RanStudy:
    """The tiny study, run to its end."""
    return run_tiny(tmp_path_factory.mktemp("study") / "tiny", tiny_study())


def run_tiny(path: Path, study: StudySpec) -> RanStudy:
    """Run a study on the session's Ray."""
    from lbstudy.training import datasets
    from lbstudy.tuning import tuner

    folder = StudyFolder.create(path, study)
    plan = tuner.plan(study, datasets.load_all(study), tuner.cluster_nodes())
    ran = RanStudy(folder, plan.lanes)
    left = study.tuning.trials * len(study.list_cells())

    def show(record: TrialRecord) -> None:
        nonlocal left
        ran.shown.append(record.status)
        left -= record.status in FINISHED
        if not left:
            ran.models = sum(map(_refers_to_a_model, gc.get_objects()))

    tuner.tune_study(folder, plan, show, ran.notices.append)
    return ran


def _refers_to_a_model(thing: object) -> bool:
    """Whether it is a result of a lane's with a model in it."""
    from ray import ObjectRef

    found = [thing.get(name) for name in ("model", "checkpoint")] if type(thing) is dict else []
    return any(type(values) is list and len(values) == 1 and isinstance(values[0], ObjectRef) for values in found)
