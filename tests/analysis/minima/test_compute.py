"""Tasks around minima that never come to a result, without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lbstudy.analysis.minima import compute
from lbstudy.analysis.minima.compute import Task
from lbstudy.methods import user_code
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.run import RunSpec
from lbstudy.training import datasets
from lbstudy.tuning import groups, tuner
from tests.conftest import tiny_study

RUN: dict[str, Any] = {
    "model": "lenet5", "dataset": {"name": "digits"}, "batch_size": 128, "optimizer": "sgd",
    "hyper": {"learning_rate": 0.1}, "budget": {"epochs": 1},
}  # fmt: skip


@pytest.mark.parametrize(("minutes", "said"), [(5, [2, 4]), (1, [])])
def test_a_result_that_does_not_come_is_told_and_given_up(
    minutes: float, said: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, notices = 1000.0, list[str]()

    def wait(answers: list[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        nonlocal now
        now += timeout
        return [], answers

    remote = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *arguments: object()))
    monkeypatch.setattr(compute, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(ray, "remote", lambda work: remote)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(tuner, "cluster_nodes", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(user_code, "active", lambda: None)
    other = groups.Group("1", "01000000", False, {"CPU": 1.0})
    monkeypatch.setattr(groups, "list_groups", lambda: [other])
    monkeypatch.setattr(groups, "list_jobs", lambda: {"01000000": groups.Job(False, "job 01000000 (another)", "")})
    monkeypatch.setattr(groups, "own_job", lambda: "02000000")
    study = tiny_study(resources={"timeout_minutes": minutes})
    run = RunSpec.model_validate(RUN)
    data = {datasets.source(run.dataset): None}
    with pytest.raises(
        StudyError,
        match=rf"^no result for {minutes} min: 1 CPU held by job 01000000 \(another\); given up "
        r"\(resources.timeout_minutes\); what is there stays$",
    ):
        compute.compute(
            StudyFolder(tmp_path), study, data, [Task("noise", "noise/a/0000", 1, RUN, (), {})],  # type: ignore[arg-type]
            pytest.fail, lambda task, why: pytest.fail(why), notices.append,
        )  # fmt: skip
    assert now - 1000 == 60 * minutes
    words = "min: 1 CPU held by job 01000000 (another); for up to 5 min (resources.timeout_minutes)"
    assert notices == [f"no result for {count} {words}" for count in said]
