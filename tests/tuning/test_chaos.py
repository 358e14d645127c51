"""Studies whose drivers, workers and nodes are killed at random moments. Minutes each."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord

pytestmark = pytest.mark.slow

STUDY = {
    "name": "chaos",
    "model": "lenet5",
    "dataset": {"name": "digits", "validation_size": 0.2, "augment": ["crop"]},
    "budget": {"epochs": 24},
    "schedule": {"name": "cosine", "warmup": 1},
    "cells": {"optimizer": ["sgd"], "batch_size": [32, 256], "smoothing": ["none", "mixup+noise"]},
    "search": {
        "learning_rate": {"log_uniform": [3e-3, 0.3]},
        "mixup_alpha": {"log_uniform": [0.03, 1], "when": {"smoothing": "mixup"}},
        "noise_magnitude": {"log_uniform": [1e-3, 3e-2], "when": {"smoothing": "noise"}},
    },
    "tuning": {"trials": 6, "startup_trials": 2, "pruner": {"name": "asha", "grace_period": 3, "reduction_factor": 2}},
    "resources": {"checkpoint_minutes": 0.01, "max_failures": 20},
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Driver:
    """`lbstudy run` in a process of its own, which may be killed and started again."""

    def __init__(
        self, folder: Path, address: str | None = None, study: dict[str, object] | None = None, **resources: object
    ):
        study = {**STUDY, **(study or {}), "resources": {**STUDY["resources"], **resources}}  # type: ignore[dict-item]
        self._file = folder / "chaos.yaml"
        self._file.write_text(json.dumps(study))
        self._address = address
        self.move_to(folder)
        self.log = (folder / "log.txt").open("a")
        self.process: subprocess.Popen[bytes] | None = None

    def move_to(self, storage: Path) -> None:
        """Where the study's folder shall be."""
        self._storage, self.folder = storage, StudyFolder(storage / "chaos")

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        address = ["--address", self._address] if self._address else []
        command = [sys.executable, "-m", "lbstudy", "run", str(self._file), "--storage", str(self._storage), *address]
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def epochs_written(self) -> int:
        return sum(p.read_bytes().count(b"\n") for p in (self.folder.path / "trials").glob("*/*/epochs.jsonl"))

    def wait_for_epochs(self, count: int, timeout: float = 600) -> bool:
        """Wait until so many more epochs are written; False if the driver ended before."""
        assert self.process is not None
        before, deadline = self.epochs_written(), time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            written = self.epochs_written()
            before = min(before, written)  # series are cut back when a driver begins
            if written >= before + count:
                return True
            time.sleep(0.02)
        raise TimeoutError(f"no {count} epochs in {timeout} s: {Path(self.log.name).read_text()[-2000:]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self, timeout: float = 900) -> int:
        assert self.process is not None
        return self.process.wait(timeout)


def assert_whole(folder: StudyFolder) -> list[TrialRecord]:
    """24 finished trials, none lost or repeated, every series without gap or repeat."""
    records, damaged = folder.scan()
    assert damaged == []
    assert [r.number for r in records] == [*range(6)] * 4
    assert {r.status for r in records} <= set(FINISHED)
    for record in records:
        lines = (folder.trial_folder(record) / "epochs.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, record.epochs + 1))
    return records


def essence(record: TrialRecord) -> dict[str, object]:
    """What must not depend on when a trial ran."""
    kept = dataclasses.asdict(record)
    for name in ("started", "seconds", "memory", "device_memory", "failures", "error", "nodes", "moves", "lost"):
        kept.pop(name)
    kept["metrics"] = {k: v for k, v in record.metrics.items() if k not in ("seconds", "images_per_second")}
    return kept


def train_workers() -> list[psutil.Process]:
    """The training workers that the test's drivers have started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "RayTrainWorker" in process.name() and process.environ().get("CHAOS_TEST") == os.environ["CHAOS_TEST"]:
                found.append(process)
    return found


@pytest.fixture
def no_stray_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every Ray process that the test starts is gone soon after it; they inherit a mark in their environment."""
    mark = uuid4().hex
    monkeypatch.setenv("CHAOS_TEST", mark)
    yield
    deadline = time.monotonic() + 150  # Ray's own agents linger for 90 s after a killed driver

    def strays() -> list[str]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("CHAOS_TEST") == mark and process.pid != os.getpid():
                    found.append(process.name())
        return [name for name in found if "ray" in name.lower() or "gcs" in name]

    while strays() and time.monotonic() < deadline:
        time.sleep(1)
    assert strays() == []


def test_killed_driver_ends_where_an_uninterrupted_one_does(tmp_path: Path, no_stray_processes: None):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Driver(tmp_path / "whole", cpus_per_worker=2)  # two cores: one lane
    whole.start()
    assert whole.finish() == 0
    killed, draw, kills = Driver(tmp_path / "killed", cpus_per_worker=2), random.Random(0), 0
    while kills < 10:
        killed.start()
        if not killed.wait_for_epochs(draw.randint(1, 30)):
            break
        killed.kill()
        kills += 1
    killed.start()
    assert killed.finish() == 0
    assert kills >= 8
    pairs = zip(assert_whole(whole.folder), assert_whole(killed.folder), strict=True)
    for one, other in pairs:
        assert essence(one) == essence(other)
    assert "pruned" in {r.status for r in whole.folder.trials()}


def test_killed_drivers_workers_and_nodes_lose_nothing(tmp_path: Path, no_stray_processes: None):
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    driver, draw = Driver(tmp_path, cluster.address, timeout_minutes=2), random.Random(1)
    try:
        faults = ["driver"] * 10 + ["worker"] * 5 + ["node"] * 2
        draw.shuffle(faults)
        driver.start()
        for fault in faults:
            assert driver.wait_for_epochs(draw.randint(2, 12)), f"the driver ended before the fault of a {fault}"
            if fault == "driver":
                driver.kill()
                driver.start()
            elif fault == "worker":
                if workers := train_workers():
                    draw.choice(workers).kill()
            else:
                cluster.remove_node(nodes.pop(draw.randrange(len(nodes))), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
        assert driver.finish() == 0
    finally:
        if driver.process is not None and driver.process.poll() is None:
            driver.kill()
        cluster.shutdown()
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)
    assert_whole(driver.folder)


def test_simulated_cluster_gives_the_table_of_one_node(tmp_path: Path, no_stray_processes: None):
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    searched = {"tuning": {"trials": 3, "sampler": "random", "pruner": "none"}}  # suggestions must not depend on timing
    tables = []
    for name, head_cpus, nodes in (("one", 2, 0), ("three", 0, 2)):
        (tmp_path / name).mkdir()
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": head_cpus, "include_dashboard": True, "dashboard_port": free_port()},
        )
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        driver = Driver(tmp_path / name, cluster.address, study=searched)
        try:
            driver.start()
            assert driver.finish() == 0
        finally:
            cluster.shutdown()
            Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)
        tables.append([essence(record) for record in driver.folder.trials()])
    assert len(tables[0]) == 12
    assert tables[0] == tables[1]


def test_hung_worker_is_a_failure_and_the_study_ends(tmp_path: Path, no_stray_processes: None):
    driver = Driver(tmp_path, timeout_minutes=0.25, max_failures=0, cpus_per_worker=2)
    driver.start()
    assert driver.wait_for_epochs(3)
    stopped = train_workers()
    assert stopped
    for process in stopped:
        process.suspend()  # it is there, but it does nothing: like a worker stuck in a collective operation
    assert driver.finish() == 1
    records = assert_whole(driver.folder)
    failed = [r for r in records if r.status == "failed"]
    assert len(failed) == 1
    assert "no report for" in failed[0].error
