"""A lane by itself, without Tune."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import psutil
import pytest
import ray

from lbstudy.methods import optimizers, smoothing
from lbstudy.study.code import Code
from lbstudy.study.run import DatasetSpec, RunSpec
from lbstudy.study.spec import Resources
from lbstudy.training import datasets
from lbstudy.training.data import place
from lbstudy.training.train import train
from lbstudy.tuning import groups
from lbstudy.tuning.lane import Job, Lane, LaneBroken, LaneWaits
from tests.methods import examples

DIGITS = DatasetSpec(name="digits", validation_size=0.2)


@pytest.fixture(scope="module")
def lane(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    data = {datasets.source(DIGITS): ray.put(datasets.load(DIGITS))}
    storage = str(tmp_path_factory.mktemp("lane"))
    lane = Lane(Resources(gpus_per_worker=0), data, ray.put(Code()), storage, "test-lane")
    assert lane.come_up() == [ray.nodes()[0]["NodeManagerHostname"]]
    yield lane
    lane.end()


def job(key: str, rungs: list[int] | None = None, **run: object) -> Job:
    defaults = {
        "model": "lenet5", "dataset": DIGITS, "batch_size": 128, "optimizer": "sgd", "hyper": {"learning_rate": 0.1},
        "budget": {"epochs": 3},
    }  # fmt: skip
    spec = RunSpec.model_validate({**defaults, **run})
    return Job(key, spec.model_dump(mode="json"), rungs or [])


def reports(lane: Lane) -> list[dict[str, object]]:
    taken = [lane.next_report()]
    while "outcome" not in taken[-1]:
        taken.append(lane.next_report())
    return taken


def test_reports_an_epoch_at_a_time_and_says_how_it_ended(lane: Lane):
    lane.begin(job("a"))
    taken = reports(lane)
    assert [r["epoch"] for r in taken] == [1, 2, 3]
    assert taken[-1]["outcome"] == "completed"
    assert (taken[-1]["device"], taken[-1]["workers"]) == ("1 x cpu", 1)


def test_same_job_twice_is_the_same_to_the_bit(lane: Lane):
    fingerprints = []
    for key, seed in (("b", 1), ("c", 2), ("d", 1)):
        lane.begin(job(key, seed=seed))
        fingerprints.append(reports(lane)[-1]["fingerprint"])
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def every_method_once() -> list[tuple[str, str]]:
    """Each built-in optimizer with a smoothing, until each of both has had its turn."""
    count = max(len(optimizers.names()), len(smoothing.names()))
    pairs = zip(range(count), cycle(optimizers.names()), cycle(smoothing.names()), strict=False)
    return [("kfac", "mixup+noise"), *((optimizer, name) for _, optimizer, name in pairs)]


@pytest.mark.parametrize(("optimizer", "smoothing"), every_method_once())
def test_a_job_in_a_warm_lane_is_that_in_a_fresh_process(lane: Lane, optimizer: str, smoothing: str):
    hyper = examples.hyper(optimizer, smoothing)
    spec = job(f"{optimizer} {smoothing}", optimizer=optimizer, smoothing=smoothing, hyper=hyper, batch_size=256)
    lane.begin(spec)
    run = RunSpec.model_validate(spec.run)
    fresh = train(run, place(datasets.load(DIGITS), run.dataset, run.split_seed))
    assert reports(lane)[-1]["fingerprint"] == fresh.fingerprint
    assert not fresh.diverged


def test_abandoned_job_stops_at_its_rung(lane: Lane):
    lane.begin(job("long", rungs=[1], budget={"epochs": 100_000}))
    assert lane.next_report()["epoch"] == 1
    lane.begin(job("next"))  # the long one waits at its rung for a verdict, and this is it
    assert [r["epoch"] for r in reports(lane)] == [1, 2, 3]


def test_failed_job_brings_its_traceback_and_the_lane_goes_on(lane: Lane):
    broken = job("broken")
    lane.begin(Job("broken", broken.run | {"model": "no such model"}, []))
    report = lane.next_report()
    assert report["outcome"] == "failed"
    assert "no such model" in str(report["error"])
    lane.begin(job("after"))
    assert reports(lane)[-1]["outcome"] == "completed"


def test_a_lane_without_resources_waits_and_one_whose_group_is_taken_away_is_broken(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lbstudy.tuning.lane.WAIT_SECONDS", 2.0)
    waits = Lane(Resources(cpus_per_worker=9999, gpus_per_worker=0), {}, ray.put(Code()), str(tmp_path), "waits")

    def asked() -> list[groups.Group]:
        return [g for g in groups.list_groups() if g.waits and g.resources.get("CPU") == 9999]

    for _ in range(60):  # its controller is a process, which has to come up
        if asked():
            break
        time.sleep(1)
    with pytest.raises(LaneWaits, match="its resources have not been there for 2 s"):
        waits.come_up()
    assert waits.is_alive()
    groups.remove(asked())
    with pytest.raises(LaneBroken):
        waits.come_up()
    assert not waits.is_alive()
    assert waits.gone() == []


@pytest.mark.slow
def test_workers_that_hang_before_they_are_up_give_back_what_they_hold(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray Train would wait for them as long as they live, and no other group could have their place."""

    def hang(config: object) -> None:
        import time

        time.sleep(3600)

    def held() -> list[groups.Group]:
        return [g for g in groups.list_groups() if g.resources.get("CPU") == 0.25]

    monkeypatch.setattr("lbstudy.tuning.lane._serve", hang)
    resources = Resources(cpus_per_worker=0.25, gpus_per_worker=0)
    hangs = Lane(resources, {}, ray.put(Code()), str(tmp_path), "hangs")
    deadline = time.monotonic() + 300
    while not ray.get(hangs._mailbox.start.remote(1)).nodes:  # all its processes import torch
        assert time.monotonic() < deadline
    monkeypatch.setattr("lbstudy.tuning.lane.START_SECONDS", 5.0)
    with pytest.raises(LaneBroken, match="the workers on .* have not come up within 5 s"):
        hangs.come_up()
    (group,) = held()
    assert not group.waits
    deadline = time.monotonic() + 60
    while hangs._thread.is_alive() or not held()[0].orphan:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    groups.remove(held())  # as the supervisor does
    assert held() == []


def test_a_node_that_is_about_to_go_is_trained_on_to_the_next_checkpoint(lane: Lane, monkeypatch: pytest.MonkeyPatch):
    """Reports bring checkpoints from the notice on, though none is due."""
    monkeypatch.setattr("lbstudy.tuning.lane.DRAIN_SECONDS", 0.0)
    monkeypatch.setattr("lbstudy.tuning.lane.POLL_SECONDS", 0.01)
    (node,) = ray.nodes()
    lane.begin(job("spot", rungs=[2], budget={"epochs": 20}))
    assert ["checkpoint" in lane.next_report() for _ in (1, 2)] == [False, False]
    monkeypatch.setattr("lbstudy.tuning.lane.draining", lambda: {node["NodeID"]})
    monkeypatch.setattr(lane, "_lost", False)  # and again afterwards: others use this lane
    lane._save_before_a_node_goes()
    assert lane.gone() == [node["NodeManagerHostname"]]
    assert "checkpoint" in [lane.next_report() for _ in range(2)][-1]
    assert reports(lane)[-1]["outcome"] == "completed"  # others use this lane


def test_a_node_whose_ray_does_not_open_is_gone_before_ray_notices(lane: Lane, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lbstudy.tuning.lane.GONE_SECONDS", 1.0)
    (node,) = ray.nodes()
    with monkeypatch.context() as patch:
        patch.setattr("lbstudy.tuning.lane.draining", set)
        patch.setattr(lane, "_lost", False)
        assert lane.gone() == []
        with socket.create_server(("127.0.0.1", 0)) as unused:
            closed = unused.getsockname()[1]
        patch.setattr(ray, "nodes", lambda: [node | {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": closed}])
        assert lane.gone() == [node["NodeManagerHostname"]]


def processes(actor: str) -> list[psutil.Process]:
    """Those of an actor's class, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{actor}"):
                found.append(process)
    return found


def test_a_lane_has_no_process_that_it_does_not_need_and_its_controller_no_torch(lane: Lane):
    """What each of them takes on the head: docs/cluster.md."""
    (controller,) = processes("TrainController")
    (worker,) = processes("RayTrainWorker")
    assert not processes("DatasetManager")
    assert not processes("PlacementGroupCleaner")
    loaded = {p: {Path(m.path).name for m in p.memory_maps()} for p in (controller, worker)}
    assert "libtorch_cpu.so" in loaded[worker]
    assert "libtorch_cpu.so" not in loaded[controller]


def test_what_a_controller_that_was_killed_has_held_is_known_and_given_back(lane: Lane):
    """Last here, for the lane ends. `Supervisor` does it; Ray's own cleaner would be a process for each lane."""
    held = [group for group in groups.list_groups() if group.is_for()]
    assert [group.orphan for group in held] == [False]
    (controller,) = processes("TrainController")
    controller.kill()
    for _ in range(60):
        orphans = [group for group in groups.list_groups() if group.orphan and group.is_for()]
        if orphans and not lane.is_alive():
            break
        time.sleep(0.5)
    assert [group.id for group in orphans] == [group.id for group in held]
    assert not lane.is_alive()
    groups.remove(orphans)
    for _ in range(60):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            break
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    assert not [group for group in groups.list_groups() if group.is_for()]
