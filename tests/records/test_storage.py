"""Studies in an object store: the S3 protocol of a server on this machine."""

import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lbstudy import storage
from lbstudy.analysis.tables import best as tables
from lbstudy.records import lock
from lbstudy.records.checksum import Damaged
from lbstudy.records.folder import LOCK, StudyFolder, set_aside
from lbstudy.records.lock import DriverLock
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.storage import ObjectPath, StorageError, locate
from lbstudy.study.file import StudyError
from lbstudy.study.spec import StudySpec
from lbstudy.tuning import doctor
from tests.conftest import run_tiny, tiny_study
from tests.console.test_cli import lbstudy
from tests.records.test_folder import Crash, CrashPoint, record, script

TINIEST = {
    "name": "tiniest",
    "model": "lenet5",
    "dataset": {"name": "digits", "validation_size": 0.2},
    "budget": {"epochs": 2},
    "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]},
    "search": {"learning_rate": {"log_uniform": [1e-3, 1e-1]}},
    "tuning": {"trials": 2, "pruner": "none"},
}


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """An S3 server with a bucket `studies`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/studies", method="PUT"))
    yield address
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "nobody"), ("SECRET_ACCESS_KEY", "none"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(storage, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def place(endpoint: str) -> ObjectPath:
    """A folder of its own for every test."""
    place = locate(f"s3://studies/{uuid4().hex}/?endpoint_override={endpoint}")
    assert isinstance(place, ObjectPath)
    return place


@pytest.fixture
def folder(place: ObjectPath) -> StudyFolder:
    return StudyFolder.create(place / "tiny", tiny_study())


def test_a_series_that_grows_in_an_object_store_is_read_once(place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    folder, trial, reads = StudyFolder.create(place / "s", tiny_study()), record(), []
    folder.append_epoch(trial, {"epoch": 1})
    read_bytes = ObjectPath.read_bytes
    monkeypatch.setattr(ObjectPath, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    series = folder.series(trial)
    for epoch in range(2, 6):
        series.add({"epoch": epoch})
    assert reads == ["epochs.jsonl"]
    assert folder.epochs(trial) == [{"epoch": epoch} for epoch in range(1, 6)]


def test_a_line_that_was_not_written_is_not_taken_for_written(place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    folder, trial = StudyFolder.create(place / "s", tiny_study()), record()
    series = folder.series(trial)
    series.add({"epoch": 1})

    def refuse(path: ObjectPath, content: bytes) -> None:
        raise StorageError(str(path), "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "write_bytes", refuse)
        with pytest.raises(StorageError, match="no answer"):
            series.add({"epoch": 2})
    series.add({"epoch": 2})
    assert folder.epochs(trial) == [{"epoch": 1}, {"epoch": 2}]


class TestObjectPath:
    def test_behaves_like_a_path(self, place: ObjectPath, tmp_path: Path):
        """The same calls on both, and the same answers."""
        answers = []
        for root in (place, tmp_path / "root"):
            root.mkdir()
            for name in ("a/x/trial.json", "b/x/trial.json", "a/trial.json", "a/x/y/trial.json", "a/x/other.json"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                storage.write(root / name, name.encode())
            storage.append(root / "b/x/lines", b"one\n")
            storage.append(root / "b/x/lines", b"two\n")
            storage.touch(root / "b/x/lines")
            (root / "a/x/other.json").replace(root / "b/moved")
            answers.append(
                {
                    "glob": sorted(
                        str(p).replace(str(root).partition("?")[0], "") for p in root.glob("*/*/trial.json")
                    ),
                    "iterdir": sorted(p.name for p in root.iterdir()),
                    "files": [(root / name).is_file() for name in ("a", "b/moved", "a/x/other.json", "none")],
                    "folders": [(root / name).is_dir() for name in ("a", "b/moved", "none")],
                    "exist": [(root / name).exists() for name in ("a", "b/moved", "none")],
                    "lines": (root / "b/x/lines").read_text(encoding="utf-8"),
                    "all": list(storage.read_all([root / "b/moved", root / "a/trial.json"])),
                    "missing": storage.read(root / "none"),
                    "created": [storage.create(root / "new", b"1"), storage.create(root / "new", b"2")],
                    "content": (root / "new").read_bytes(),
                    "names": ((root / "a/x").name, (root / "a/x").parent.name, (root / "a/x").with_name("z").name),
                }
            )
            (root / "new").unlink()
            (root / "new").unlink(missing_ok=True)
            for missing in ((root / "new").unlink, (root / "new").read_bytes):
                with pytest.raises(FileNotFoundError):
                    missing()
        assert [name.partition("?")[0] for name in answers[0].pop("glob")] == answers[1].pop("glob")
        assert answers[0] == answers[1]

    def test_address_leads_back_to_the_object(self, place: ObjectPath):
        storage.write(place / "x", b"content")
        assert locate(str(place / "x")).read_bytes() == b"content"
        assert locate(str(place / "x")) == place / "x"

    def test_large_object(self, place: ObjectPath):
        content = os.urandom(12_000_000)  # more than a part of an upload in parts
        storage.write(place / "x", content)
        assert (place / "x").read_bytes() == content

    def test_age_is_by_the_clock_of_the_store(self, place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
        storage.write(place / "x", b"")
        time.sleep(2)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert 1 <= storage.age(place / "x") < 60
        assert [p.name for p in place.iterdir()] == ["x"]

    def test_local_file_becomes_the_object(self, place: ObjectPath):
        def fail() -> None:
            with storage.local_file(place / "x") as local:
                local.write_text("what was written before the error")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert (place / "x").read_text() == "what was written before the error"


class TestRecords:
    def test_study_and_trials_read_back(self, folder: StudyFolder):
        written = record(status="completed", metrics={"epoch": 3, "val_loss": 0.25})
        folder.write_trial(written)
        for epoch in (1, 2, 3):
            folder.append_epoch(written, {"epoch": epoch})
        folder.write_state(written, "model", 3, b"state")
        again = StudyFolder.open(str(folder.path))
        assert again.study() == tiny_study()
        assert again.trials() == [written]
        assert [e["epoch"] for e in again.epochs(written)] == [1, 2, 3]
        assert again.read_state(written, "model") == (3, b"state")
        assert again.read_state(written, "checkpoint") is None
        again.keep_epochs(written, 1)
        again.drop_state(written, "model")
        assert [e["epoch"] for e in again.epochs(written)] == [1]
        assert again.read_state(written, "model") is None

    def test_damaged_objects_are_found_and_set_aside(self, folder: StudyFolder):
        folder.write_trial(record())
        folder.write_state(record(), "checkpoint", 7, b"state")
        trial, checkpoint = (folder.trial_folder(record()) / name for name in ("trial.json", "checkpoint.pt"))
        storage.write(trial, trial.read_bytes().replace(b"0.1", b"0.2"))
        storage.write(checkpoint, checkpoint.read_bytes()[:-1])
        assert folder.scan() == ([], [trial])
        with pytest.raises(Damaged, match="checkpoint.pt"):
            folder.read_state(record(), "checkpoint")
        assert set_aside(trial).name == "trial.json.damaged"
        assert folder.scan() == ([], [])

    def test_another_study_is_refused_as_on_a_file_system(self, folder: StudyFolder, place: ObjectPath):
        StudyFolder.check(folder.path, tiny_study(resources={"workers": 2}))
        with pytest.raises(StudyError, match="holds another study"):
            StudyFolder.check(folder.path, tiny_study(seed=1))
        with pytest.raises(StudyError, match="is not empty and holds no study"):
            StudyFolder.check(place, tiny_study())
        with pytest.raises(StudyError, match="no study here"):
            StudyFolder.open(place / "nowhere")

    def test_many_records_are_read_at_a_time(self, folder: StudyFolder):
        written = [record(number=number) for number in range(100)]
        for trial in written:
            folder.write_trial(trial)
        assert folder.trials() == written

    @pytest.mark.parametrize("after", [False, True], ids=["before the request", "after it"])
    def test_a_crash_at_any_request_leaves_a_readable_study(self, place: ObjectPath, monkeypatch, after: bool):
        crashes = 0
        for crash_at in range(1, 100):
            point = CrashPoint(crash_at, after)
            folder = StudyFolder(place / str(crash_at))
            written: list[TrialRecord] = []
            with monkeypatch.context() as patch:
                for name in ("write_bytes", "unlink", "read_bytes"):
                    patch.setattr(ObjectPath, name, point.crashing(getattr(ObjectPath, name)))
                try:
                    script(folder, written)
                except Crash:
                    crashes += 1
            found, damaged = folder.scan()
            assert damaged == []
            assert len(found) <= 1
            for trial in found:
                assert trial in written
                assert [e["epoch"] for e in folder.epochs(trial)] in ([], [1], [1, 2], [1, 2, 3])
                folder.read_state(trial, "checkpoint")
            if point.count < crash_at:
                break
        assert crashes > 12
        assert found == [written[-1]]  # the last round did not crash


class TestLock:
    def test_second_driver_is_told_of_the_first(self, place: ObjectPath):
        with DriverLock(place, print):
            with pytest.raises(StudyError, match=rf"host {platform.node()}, process {os.getpid()}, since 20"):
                DriverLock(place, print).__enter__()
            StudyFolder.check(place, tiny_study())  # the lock alone does not fill a folder
        assert not list(place.iterdir())

    def test_of_drivers_that_begin_at_once_no_two_hold_it(self, place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(storage, "SETTLE_SECONDS", 1.0)
        barrier = threading.Barrier(4)

        def create(content: bytes) -> bool:
            barrier.wait()
            return storage.create(place / LOCK, content)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(create, [b"%d" % n for n in range(4)])).count(True) == 1

    def test_lock_of_another_host_is_stale_when_nobody_touches_it(self, place: ObjectPath, monkeypatch):
        storage.write(place / LOCK, json.dumps({"host": "elsewhere", "pid": 1, "since": "then"}).encode())
        monkeypatch.setattr(lock, "STALE_SECONDS", 2.5)  # the server's clock counts in seconds
        notices: list[str] = []
        with DriverLock(place, notices.append):
            assert "elsewhere" in notices[0]

    @pytest.mark.parametrize("kind", ["file system", "object store"])
    def test_driver_whose_lock_is_taken_over_is_interrupted(self, kind, place, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.1)
        path, notices = tmp_path if kind == "file system" else place, []
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

        def be_robbed() -> None:
            with DriverLock(path, notices.append):
                time.sleep(0.5)
                assert notices == []
                for _ in range(100):  # the other one touches the lock too
                    storage.write(path / LOCK, json.dumps({"host": "elsewhere", "pid": 1}).encode())
                    time.sleep(0.1)

        try:
            with pytest.raises(KeyboardInterrupt):
                be_robbed()
        finally:
            signal.signal(signal.SIGINT, before)
        assert "elsewhere" in notices[0]
        assert json.loads((path / LOCK).read_text())["host"] == "elsewhere"  # and the other's lock stays


class Refusing(BaseHTTPRequestHandler):
    """A server that denies everything, as S3 does it."""

    def answer(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>You may not</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = answer

    def log_message(self, format: str, *values: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def refusing() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def unreachable() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *product(("no such bucket", "access denied"), ("run", "status")),
        *(  # several tries of a second or two each
            pytest.param("unreachable", command, marks=pytest.mark.long) for command in ("run", "status")
        ),
    ],
)
def test_a_store_that_fails_is_one_error_and_exit_code_2(
    case: str, command: str, endpoint: str, refusing: str, tmp_path: Path, monkeypatch, capsys
):
    server = {"no such bucket": endpoint, "access denied": refusing, "unreachable": unreachable()}[case]
    where = f"s3://nobucket/x?endpoint_override={server}"
    reason = {"unreachable": "network connection: Could not connect to server"}.get(case, case)
    if command == "status":
        reason = {"no such bucket": "no study here"}.get(case, reason)
        arguments = ["status", where]
    else:
        study = tmp_path / "tiniest.yaml"
        study.write_text(json.dumps(TINIEST))
        arguments = ["run", str(study), "--storage", where]
    began = time.monotonic()
    assert lbstudy(monkeypatch, *arguments) == 2
    assert time.monotonic() - began < 30
    printed = capsys.readouterr().err
    assert reason in printed
    assert printed.count("\n") == 1
    assert "starting Ray" not in printed


@pytest.mark.slow
def test_a_store_that_is_silent_is_given_up(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        where = f"s3://studies/x?endpoint_override=http://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        assert lbstudy(monkeypatch, "status", where) == 2
    assert time.monotonic() - began < 120
    assert "Timeout was reached" in capsys.readouterr().err


def test_start_up_check(place: ObjectPath, endpoint: str):
    finding = doctor.check_storage(place / "new", 10**18)
    assert finding.ok
    assert finding.sentence == f"{place / 'new'} can be written"
    assert not list((place / "new").iterdir())
    missing = doctor.check_storage(locate(f"s3://nobucket/x?endpoint_override={endpoint}"), 0)
    assert not missing.ok
    assert "cannot be written: no such bucket: The specified bucket does not exist" in missing.sentence


def test_store_that_loses_what_is_written_is_found(place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ObjectPath, "read_bytes", lambda self: b"")
    with pytest.raises(StorageError, match="reads back differently"):
        storage.require_writable(place)


@pytest.mark.slow
def test_a_study_runs_in_an_object_store(ray_session: None, place: ObjectPath, tmp_path: Path, monkeypatch, capsys):
    ran = run_tiny(place / "tiniest", StudySpec.model_validate(TINIEST))  # type: ignore[arg-type]
    records = ran.folder.trials()
    assert [r.status for r in records] == ["completed"] * 2
    for trial in records:
        assert [e["epoch"] for e in ran.folder.epochs(trial)] == [1, 2]
    assert any(ran.folder.read_state(trial, "model") for trial in records)
    journal = tmp_path / "optuna.journal"
    journal.write_bytes(ran.folder.journal.read_bytes())
    assert len(JournalStorage(JournalFileBackend(str(journal))).get_all_studies()) == 1
    assert {path.name for path in ran.folder.path.iterdir()} == {
        "study.yaml",
        "environment.json",
        "trials",
        "optuna.journal",
    }
    assert lbstudy(monkeypatch, "best", str(ran.folder.path), "--format", "csv") == 0
    assert capsys.readouterr().out == tables.render(tables.best_configs(ran.folder), "csv") + "\n"


@pytest.mark.slow
def test_killed_driver_goes_on(place: ObjectPath, tmp_path: Path):
    study = tmp_path / "study.yaml"
    study.write_text(
        json.dumps(
            TINIEST | {"budget": {"epochs": 20}, "resources": {"checkpoint_minutes": 0.01, "cpus_per_worker": 2}}
        )
    )
    folder = StudyFolder(place / "tiniest")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}

    def driver(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "lbstudy", "run", *arguments]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    first = driver(str(study), "--storage", str(place))
    try:
        deadline = time.monotonic() + 600
        while not any(folder.epochs(trial) and folder.read_state(trial, "checkpoint") for trial in folder.trials()):
            assert time.monotonic() < deadline
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert "running" in {trial.status for trial in folder.trials()}
    second = driver(str(folder.path))
    try:
        _, printed = second.communicate(timeout=600)
    finally:
        second.kill()
    assert second.returncode == 0, printed
    assert re.search(r"taking over from a driver \(host .*\) that has died", printed)
    assert "was interrupted; it goes on after epoch" in printed
    records = folder.trials()
    assert [trial.number for trial in records] == [0, 1]
    assert all(trial.status in FINISHED for trial in records)
    for trial in records:
        assert [e["epoch"] for e in folder.epochs(trial)] == list(range(1, 21))
