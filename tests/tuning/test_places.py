"""Studies on several machines in small: what one's own machines, in all their variety, did to them. Minutes each."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED
from tests.tuning.hosts import Hosts

pytestmark = pytest.mark.slow

STUDY = {
    "model": "lenet5",
    "dataset": {"name": "digits", "validation_size": 0.2},
    "budget": {"epochs": 6},
    "cells": {"optimizer": ["sgd"], "batch_size": [64], "smoothing": ["none"]},
    "search": {"learning_rate": {"log_uniform": [0.01, 0.1]}},
    "tuning": {"trials": 4, "sampler": "random", "pruner": "none"},
}
NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path, 3)
    yield found
    found.close()


def run(hosts: Hosts, folder: Path, name: str, **changes: Any) -> "subprocess.Popen[bytes]":
    """Begin a study, or go on with it; its log is NAME.log."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"name": name, **STUDY, **changes}))
    return hosts.lbstudy(
        "run", str(file), "--storage", str(folder / "studies"), log=f"{name}.log", PYTHONUNBUFFERED="1"
    )


def wait_for(condition: Callable[[], object], seconds: float = 300) -> float:
    """Wait; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "in vain"
        time.sleep(0.2)
    return time.monotonic() - began


def test_two_nodes_as_debian_names_them_train_and_nodes_that_do_not_reach_each_other_are_named(
    hosts: Hosts, tmp_path: Path
):
    for host in range(3):
        hosts.join(host)
    study = run(hosts, tmp_path, "two", resources={"workers": 2})
    assert study.wait(400) == 0, hosts.log("two.log")
    records = StudyFolder(tmp_path / "studies" / "two").trials()
    assert [record.nodes for record in records] == [hosts.names[1:]] * 4
    hosts.part(1, 2)
    study = run(hosts, tmp_path, "parted", resources={"workers": 2})
    wait_for(lambda: "on 1 lanes" in hosts.log("parted.log"))
    said = wait_for(lambda: "cannot reach" in hosts.log("parted.log"))
    assert study.wait(400) == 2
    print(f"told {said:.0f} s after the beginning\n{hosts.log('parted.log')}")
    first, second = (f"{hosts.names[i]} ({hosts.addresses[i]})" for i in (1, 2))
    reason = re.escape(f"{first} cannot reach {second}: {hosts.addresses[2]}: ")
    assert re.search(f"notice: a worker group has not come up: .*{reason}", hosts.log("parted.log"))
    assert re.search(f"error: no worker group comes up, after 3 tries: .*{reason}", hosts.log("parted.log"))
    (record,) = StudyFolder(tmp_path / "studies" / "parted").trials()
    assert (record.status, record.failures) == ("running", 0)
    assert "cannot reach" in record.error
    assert hosts.lbstudy("doctor", log="doctor.log").wait(200) == 2
    assert re.search(f"✗ workers on several nodes: .*{reason}", hosts.log("doctor.log"))


def test_a_study_grows_and_shrinks_with_its_cluster(hosts: Hosts, tmp_path: Path):
    """It waits for its first node, is joined by another and by one that lacks a package, and loses the first."""
    (tmp_path / "without" / "torch").mkdir(parents=True)
    (tmp_path / "without" / "torch" / "__init__.py").write_text(NO_TORCH)
    hosts.join(0)
    resources = {"checkpoint_minutes": 0, "max_failures": 0}
    study = run(hosts, tmp_path, "grows", budget={"epochs": 150}, resources=resources)
    log = lambda: hosts.log("grows.log")  # noqa: E731
    wait_for(lambda: "waiting for nodes, up to 60 min" in log())
    hosts.join(1)
    wait_for(lambda: "on 1 lanes" in log())
    folder = StudyFolder(tmp_path / "studies" / "grows")
    wait_for(lambda: list(folder.path.glob("trials/*/*/epochs.jsonl")))
    hosts.join(2, PYTHONPATH=str(tmp_path / "without"))
    wait_for(lambda: "is left out" in log())
    assert f"{hosts.names[2]} ({hosts.addresses[2]}) is left out: ModuleNotFoundError" in log()
    hosts.cut(2)
    hosts.join(2)
    wait_for(lambda: f"2 lanes instead of 1: {hosts.names[2]} ({hosts.addresses[2]}) has joined" in log())
    wait_for(lambda: any(record.nodes == hosts.names[2:] for record in folder.trials()))
    hosts.cut(1)
    wait_for(lambda: f"1 lane instead of 2: {hosts.names[1]} ({hosts.addresses[1]}) has gone" in log())
    assert study.wait(900) == 0, log()
    records = folder.trials()
    print(log(), *((r.nodes, r.moves, r.lost) for r in records), sep="\n")
    assert [(r.status in FINISHED, r.failures, r.epochs) for r in records] == [(True, 0, 150)] * 4
    (moved,) = [record for record in records if record.moves]
    assert moved.nodes == hosts.names[1:]
    assert moved.moves[0]["gone"] == hosts.names[1:2]
    assert moved.lost > 0
    alone = run(hosts, tmp_path, "alone", budget={"epochs": 150}, resources=resources)
    assert alone.wait(600) == 0
    others = StudyFolder(tmp_path / "studies" / "alone").trials()
    assert [r.fingerprint for r in records] == [r.fingerprint for r in others]


GROUPS = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level=40); "
COUNT = GROUPS + "print(sum(g['state'] != 'REMOVED' for g in ray.util.placement_group_table().values()))"


def test_studies_that_are_stopped_while_they_wait_leave_nothing_and_what_is_left_is_found(hosts: Hosts, tmp_path: Path):
    def groups(number: int) -> int:
        count = hosts.start(0, sys.executable, "-c", COUNT, f"{hosts.addresses[0]}:6379", log=f"groups{number}.log")
        assert count.wait(100) == 0
        return int(hosts.log(f"groups{number}.log").split()[-1])

    for host in range(3):
        hosts.join(host)
    first = run(hosts, tmp_path, "first", budget={"epochs": 100_000})
    wait_for(lambda: list((tmp_path / "studies" / "first").glob("trials/*/*/epochs.jsonl")))
    second = run(hosts, tmp_path, "second", resources={"wait_minutes": 0.1})
    wait_for(lambda: "lanes wait" in hosts.log("second.log") or second.poll() is not None)
    assert second.wait(200) == 2
    line = hosts.log("second.log")
    assert re.search(
        r"given up after \d min \(resources.wait_minutes\): 2 lanes wait for 1 CPU: 2 CPU held by job", line
    )
    assert "first.yaml" in line
    third = run(hosts, tmp_path, "third")
    wait_for(lambda: "2 lanes wait for 1 CPU: 2 CPU held by job" in hosts.log("third.log"))
    for study in (third, first):
        study.send_signal(signal.SIGTERM)
    assert [study.wait(100) for study in (third, first)] == [143, 143]
    assert groups(1) == 0
    fourth = run(hosts, tmp_path, "fourth")
    wait_for(lambda: "on 2 lanes" in hosts.log("fourth.log"))
    time.sleep(5)  # the lanes are starting
    fourth.send_signal(signal.SIGTERM)
    assert fourth.wait(100) == 143
    assert groups(2) == 0
