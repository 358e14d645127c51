"""MLflow: a real server, on SQLite, which is killed in the middle of a study."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lbstudy.records.folder import StudyFolder
from lbstudy.trackers import Held, follow
from lbstudy.trackers import mlflow as mlflow_tracker
from lbstudy.trackers.follow import followed
from lbstudy.trackers.sync import Sync
from tests.console.test_cli import lbstudy
from tests.trackers.made_up import BEGAN, add_epoch, add_trial, make_mixed

pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lbstudy.trackers.mlflow import MLflow, _portions
from lbstudy.trackers.trial import Point

COMMAND = os.environ.get("MLFLOW_COMMAND", "mlflow")  # the client alone, which is the extra, has no server
CELL = "sgd-b32-none"


class Server:
    """An MLflow server, which can be killed and started again."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address, self._folder = f"http://127.0.0.1:{self._port}", folder

    def start(self) -> None:
        store = f"sqlite:///{self._folder}/mlflow.db"
        self._process = subprocess.Popen(
            [COMMAND, "server", "--backend-store-uri", store, "--port", str(self._port), "--workers", "1"],
            cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip

        def answers() -> bool:
            if self._process.poll() is not None:
                pytest.skip(f"`{COMMAND} server` does not start; MLFLOW_COMMAND may name a whole mlflow's command")
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200

        wait_for(answers)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("it did not come about")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which(COMMAND) is None:
        pytest.skip(f"there is no command {COMMAND}")
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def address(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "server" in request.fixturenames:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server").address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


def runs(folder: StudyFolder) -> dict[str, Run]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(folder.study().name)
    found = client.search_runs([experiment.experiment_id], f"tags.`lbstudy.study` = '{MLflow(folder)._identity}'")
    assert len({run.info.run_name for run in found}) == len(found)  # no trial twice
    return {run.info.run_name: run for run in found}


def curve(run: Run, metric: str = "val_loss") -> list[tuple[int, int, float]]:
    history = MlflowClient().get_metric_history(run.info.run_id, metric)
    return sorted((entry.step, entry.timestamp, entry.value) for entry in history)


def test_a_request_holds_whole_epochs():
    points = [Point(epoch, 0.0, dict.fromkeys(map(str, range(100)), 1.0)) for epoch in range(1, 21)]
    assert [[point.epoch for point in part] for part in _portions(points)] == [
        list(range(1, 9)), list(range(9, 17)), list(range(17, 21)),
    ]  # fmt: skip
    assert _portions([]) == []


@pytest.mark.slow
def test_runs_read_back_and_nothing_is_repeated(server: Server, tmp_path: Path, monkeypatch, capsys):
    folder = make_mixed(tmp_path / "s")
    add_trial(folder, 4, 1000)  # of several requests
    add_trial(folder, 5, 0, "failed")
    assert lbstudy(monkeypatch, "track", str(folder.path), "--to", "mlflow") == 0
    assert capsys.readouterr().out.startswith("mlflow: 7 trials told, the others were up to date: experiment tiny at ")
    found = runs(folder)
    ended = ["FINISHED", "KILLED", "FAILED", "RUNNING", "FINISHED", "FAILED"]
    status = ["completed", "pruned", "diverged", "running", "completed", "failed"]
    for number, words in enumerate(zip(ended, status, strict=True)):
        run = found[f"trials/{CELL}/{number:04d}"]
        assert (run.info.status, run.data.tags["lbstudy.status"]) == words
        assert run.data.params["learning_rate"] == str(0.1 + number)
        assert run.data.tags["lbstudy.cell"] == CELL
    first = found[f"trials/{CELL}/0000"]
    assert curve(first) == [(n, round(1000 * (BEGAN + 2 * n)), pytest.approx(1 / n)) for n in range(1, 5)]
    assert (first.info.start_time, first.info.end_time) == (1000 * BEGAN, 1000 * (BEGAN + 8))
    assert [step for step, *_ in curve(found[f"trials/{CELL}/0004"])] == list(range(1, 1001))
    assert found[f"confirm/{CELL}/0000"].data.params["trial"] == "0"

    assert MLflow(folder).held()["trials", CELL, 3] == Held(3, ended=False)
    assert lbstudy(monkeypatch, "track", str(folder.path), "--to", "mlflow") == 0
    assert capsys.readouterr().out.startswith("mlflow: 0 trials told")
    assert {name: curve(run) for name, run in runs(folder).items()} == {n: curve(run) for n, run in found.items()}


@pytest.mark.slow
def test_a_request_made_again_changes_nothing(server: Server, tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    Sync(folder, MLflow(folder)).once()
    before = {name: curve(run) for name, run in runs(folder).items()}
    tracker = MLflow(folder)
    known = tracker.held()
    sync = Sync(folder, tracker)
    sync._held = dict.fromkeys(known, Held(0, ended=False))  # as if all answers had been lost
    sync.once()
    assert {name: curve(run) for name, run in runs(folder).items()} == before


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """With MLflow's own bounds it would take a quarter of an hour."""
    folder = make_mixed(tmp_path / "s")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(mlflow_tracker.ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for name in mlflow_tracker.ENVIRONMENT:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        began = time.monotonic()
        assert lbstudy(monkeypatch, "track", str(folder.path), "--to", "mlflow") == 2
    assert time.monotonic() - began < 120
    printed = capsys.readouterr().err
    assert printed.startswith("error: mlflow: MlflowException: ")
    assert printed.endswith("; the same command goes on from here\n")


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_study(server: Server, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(follow, "PATIENCE", 30.0)
    folder, notices = make_mixed(tmp_path / "s"), []
    with followed(folder, ["mlflow"], notices.append):
        wait_for(lambda: len(runs(folder)) == 5)
        server.kill()
        running = folder.trials()[3]
        add_epoch(folder, running, 4)
        wait_for(lambda: bool(notices))
        add_epoch(folder, running, 5)
        running.status = "completed"
        folder.write_trial(running)
        began = time.monotonic()
    assert time.monotonic() - began < 60
    assert len(notices) == 1
    assert notices[0].startswith("mlflow lags behind (MlflowException: ")
    assert lbstudy(monkeypatch, "track", str(folder.path), "--to", "mlflow") == 2
    assert capsys.readouterr().err.endswith("; the same command goes on from here\n")
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert lbstudy(monkeypatch, "track", str(folder.path), "--to", "mlflow") == 0
    assert capsys.readouterr().out.startswith("mlflow: 1 trials told")
    assert [step for step, *_ in curve(runs(folder)[f"trials/{CELL}/0003"])] == [1, 2, 3, 4, 5]
    assert runs(folder)[f"trials/{CELL}/0003"].info.status == "FINISHED"
