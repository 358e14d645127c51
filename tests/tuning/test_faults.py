"""Signals, broken storage and memory that does not suffice, each for real: nothing finished is lost, nothing hangs."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED
from lbstudy.study.file import StudyError
from lbstudy.training import datasets
from lbstudy.tuning import lane, tuner
from tests.conftest import run_tiny, tiny_study
from tests.tuning.test_chaos import Driver

STUDY = {
    "budget": {"epochs": 12},
    "cells": {"optimizer": ["sgd"], "batch_size": [16], "smoothing": ["none", "mixup"]},
    "search": {
        "learning_rate": {"log_uniform": [3e-3, 0.3]},
        "mixup_alpha": {"log_uniform": [0.03, 1], "when": {"smoothing": "mixup"}},
    },
    "tuning": {"trials": 3, "pruner": "none"},
}
TRIALS = 6
CHECKPOINT = {"checkpoint_minutes": 0.001}


def processes_of(mark: str) -> list[str]:
    """Names of the processes that carry this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FAULTS_TEST") == mark and process.pid != os.getpid():
                found.append(process.name())
    return found


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A driver of a small study with one lane; when it has ended, nothing that it started is left."""
    monkeypatch.setenv("FAULTS_TEST", str(tmp_path))
    driver = Driver(tmp_path, study=STUDY, cpus_per_worker=2, **CHECKPOINT)
    yield driver
    if driver.process is not None and driver.process.poll() is None:
        driver.kill()
        pytest.fail("the driver was still running")
    deadline = time.monotonic() + 5
    while (left := processes_of(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def log(driver: Driver) -> str:
    return Path(driver.log.name).read_text()


def press(driver: Driver, number: int = signal.SIGINT) -> None:
    """As a terminal does it: the signal goes to the driver and to all that it has started and not set apart."""
    assert driver.process is not None
    os.killpg(driver.process.pid, number)


def wait_for(condition: Callable[[], bool], timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_whole(driver: Driver) -> None:
    records, damaged = driver.folder.scan()
    assert damaged == []
    assert len(records) == TRIALS
    for record in records:
        assert record.status in FINISHED
        assert [entry["epoch"] for entry in driver.folder.epochs(record)] == list(range(1, record.epochs + 1))


def finished_files(driver: Driver) -> dict[Path, bytes]:
    """The files of finished trials that nobody writes to again; a model goes when a later trial is better."""
    folders = [driver.folder.trial_folder(r) for r in driver.folder.trials() if r.status in FINISHED]
    return {path: path.read_bytes() for folder in folders for path in folder.iterdir() if path.suffix != ".pt"}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_and_the_study_goes_on(driver: Driver):
    driver.start()
    assert driver.wait_for_epochs(18)  # one trial has ended, another is half-way
    press(driver)
    began = time.monotonic()
    assert driver.finish(60) == 130
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert f"to go on: lbstudy run {driver.folder.path}" in log(driver)
    assert "Traceback" not in log(driver)
    assert not (driver.folder.path / "driver.lock").exists()
    assert not (driver.folder.path / ".lanes").exists()
    assert len(before := finished_files(driver)) > 0
    (running,) = [r for r in driver.folder.trials() if r.status == "running"]
    assert running.epochs == len(driver.folder.epochs(running)) > 0
    driver.start()
    assert driver.finish() == 0
    assert_whole(driver)
    assert {path: path.read_bytes() for path in before} == before
    assert "it goes on after epoch 0" not in log(driver)  # but after its checkpoint


@pytest.mark.slow
def test_sigterm_is_ctrl_c(driver: Driver):
    driver.start()
    assert driver.wait_for_epochs(3)
    assert driver.process is not None
    driver.process.terminate()
    assert driver.finish(60) == 143
    assert "interrupted by SIGTERM" in log(driver)
    assert f"to go on: lbstudy run {driver.folder.path}" in log(driver)
    assert "Traceback" not in log(driver)


@pytest.mark.slow
def test_second_ctrl_c_ends_the_driver_at_once(driver: Driver):
    driver.start()
    assert driver.wait_for_epochs(3)
    press(driver)
    wait_for(lambda: "once more to leave at once" in log(driver) or driver.process.poll() is not None)  # type: ignore[union-attr]
    began = time.monotonic()
    press(driver)
    assert driver.finish(60) == 130
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 3
    assert "Traceback" not in log(driver)
    assert driver.folder.scan()[1] == []
    driver.start()
    assert driver.finish() == 0
    assert_whole(driver)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.3, 1, 3])
def test_signal_while_ray_starts_leaves_nothing(driver: Driver, number: int, delay: float):
    driver.start()
    wait_for(lambda: "starting Ray" in log(driver))
    time.sleep(delay)
    press(driver, number)
    assert driver.finish(60) == 128 + number
    assert "Traceback" not in log(driver)
    assert "the study had not begun" in log(driver) or f"to go on: lbstudy run {driver.folder.path}" in log(driver)
    assert not driver.folder.path.exists() or (driver.folder.path / "study.yaml").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "lbstudy", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_storage_that_is_full_or_read_only_ends_the_driver_and_loses_nothing(driver: Driver, small_disk: Path):
    driver.move_to(small_disk)

    def fill() -> None:
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as out:
            while True:
                out.write(bytes(4096))

    def make_read_only() -> None:
        """Lay a read-only view of the disk over it: the disk itself cannot be, since the journal stays open."""
        subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
        command = ["mount", "-o", "remount,bind,ro", str(small_disk)]
        for _ in range(500):  # refused while the driver writes a record
            if not subprocess.run(command, capture_output=True).returncode:
                return
        raise AssertionError("cannot be remounted")

    before: dict[Path, bytes] = {}
    for broken, reason, mend in (
        (fill, "No space left on device", (small_disk / "filler").unlink),
        (make_read_only, "Read-only file system", lambda: subprocess.run(["umount", str(small_disk)], check=True)),
    ):
        shown = len(log(driver))
        driver.start()
        assert driver.wait_for_epochs(18)
        broken()
        assert driver.finish() == 2
        before |= finished_files(driver)
        assert {path: path.read_bytes() for path in before} == before
        lines = log(driver)[shown:].splitlines()
        (error,) = [line for line in lines if line.startswith("error:")]
        assert (
            error == f"error: {driver.folder.path}: {reason}; what has finished is safe, and the same command goes on"
        )
        assert "Traceback" not in log(driver)
        mend()
    driver.start()
    assert driver.finish() == 0
    assert_whole(driver)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.long
def test_record_that_cannot_be_written_ends_the_study_which_then_goes_on(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same without a file system to fill: no operation reaches the disk after the fourth."""
    synced = 0

    def sync(file: int) -> None:
        nonlocal synced
        synced += 1
        if synced > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    study = tiny_study(
        cells={"optimizer": ["sgd"], "batch_size": [32], "smoothing": ["none"]}, budget={"epochs": 1}, published=[],
        search={"learning_rate": {"log_uniform": [0.01, 0.1]}}, tuning={"trials": 4, "pruner": "none"},
    )  # fmt: skip
    folder = StudyFolder.create(tmp_path / "tiny", study)
    plan = tuner.plan(study, datasets.load_all(study), tuner.cluster_nodes())
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="No space left on device"):
        tuner.tune_study(folder, plan, lambda record: None, print)
    monkeypatch.undo()
    assert not list(folder.path.rglob(".*-*"))  # no half file
    assert folder.scan()[1] == []
    ran = run_tiny(tmp_path / "tiny", study)
    assert [r.status in FINISHED for r in ran.folder.trials()] == [True] * 4


class NoLane:
    """A lane whose worker group cannot come up."""

    def come_up(self) -> list[str]:
        raise lane.LaneBroken("ModuleNotFoundError: No module named 'mine'\nand where")

    def gone(self) -> list[str]:
        return []

    def end(self) -> None:
        pass


class Laneless(tuner.TrialActor):
    """Its lanes cannot come up."""

    def reset_config(self, new_config: dict[str, object]) -> bool:
        self._lane, self._begun = NoLane(), False  # type: ignore[assignment]
        return True


@pytest.mark.long
def test_worker_groups_that_cannot_come_up_end_the_study_with_the_cause(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuner, "TrialActor", Laneless)
    monkeypatch.setattr(tuner, "cluster_nodes", lambda avoid=(): [{"CPU": 1.0}])  # one lane
    monkeypatch.setattr("lbstudy.tuning.supervisor.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("lbstudy.tuning.supervisor.REST_SECONDS", 1.0)
    study = tiny_study(tuning={"trials": 2, "pruner": "none"})
    folder, said = StudyFolder.create(tmp_path / "tiny", study), list[str]()
    plan = tuner.plan(study, datasets.load_all(study), tuner.cluster_nodes())
    with pytest.raises(
        StudyError, match=r"^no worker group comes up, after \d+ tries: ModuleNotFoundError: No module named 'mine'$"
    ):
        tuner.tune_study(folder, plan, lambda record: None, said.append)
    assert said[0] == "a worker group has not come up: ModuleNotFoundError: No module named 'mine'"
    records = folder.trials()
    assert {(r.status, r.failures, r.epochs) for r in records} == {("running", 0, 0)}
    assert records[0].error.startswith("ModuleNotFoundError: No module named 'mine'")


class Forgetful(tuner.TrialActor):
    """Its workers have too little memory for mini-batches of 128, and note down who trains which."""

    notes: str

    def setup(self, config: dict[str, object]) -> None:
        serve, notes = lane._serve, self.notes

        def serve_with_little_memory(config: dict[str, object]) -> None:
            import torch

            from lbstudy.training import train

            whole = train.train

            def train_small(run, *arguments, **options):
                with open(notes, "a") as out:
                    out.write(f"{os.getpid()} {run.batch_size}\n")
                if run.batch_size == 128:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
                return whole(run, *arguments, **options)

            train.train = train_small
            try:
                serve(config)
            finally:
                train.train = whole

        lane._serve = serve_with_little_memory
        super().setup(config)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_memory_fails_the_trial_and_not_the_study(
    workers: int, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    actor = type("Forgetful", (Forgetful,), {"notes": str(tmp_path / "notes")})
    monkeypatch.setattr(tuner, "TrialActor", actor)
    monkeypatch.setattr(tuner, "cluster_nodes", lambda avoid=(): [{"CPU": float(workers)}])  # one lane
    study = tiny_study(
        cells={"optimizer": ["sgd"], "batch_size": [32, 128], "smoothing": ["none"]}, budget={"epochs": 1},
        tuning={"trials": 1, "pruner": "none"}, published=[], search={"learning_rate": {"log_uniform": [0.01, 0.1]}},
        resources={"workers": workers, "max_failures": 1, "cpus_per_worker": 1},
    )  # fmt: skip
    small, large = sorted(run_tiny(tmp_path / "tiny", study).folder.trials(), key=lambda r: r.batch_size)
    assert (small.status, small.failures) == ("completed", 0)
    assert (large.status, large.failures) == ("failed", 2)  # max_failures more tries
    assert "Traceback (most recent call last)" in large.error
    assert large.error.endswith("out of memory with batch_size 128: set resources.micro_batch_size\n")
    lines = [tuple(map(int, line.split())) for line in (tmp_path / "notes").read_text().splitlines()]
    groups = [{process for process, size in lines[i : i + workers]} for i in range(0, len(lines), workers)]
    assert len(groups) == 3
    if workers == 1:
        assert groups[0] == groups[1] == groups[2]  # the lane went on
    else:
        assert not groups[-1] & groups[-2]  # after a failure the others may wait in a collective operation: a new group
