"""What trackers are told, and when: against a tracker that remembers every call."""

import json
from pathlib import Path

import pytest

from lbstudy import trackers
from lbstudy.records import folder as folder_module
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.trackers import Held
from lbstudy.trackers.sync import Sync, opened
from lbstudy.trackers.trial import Key, TrackedTrial, identity, tracked
from tests.console.test_cli import lbstudy
from tests.trackers.made_up import BEGAN, add_epoch, add_trial, make_mixed, make_study


class Remembering:
    """Keeps what it is told; fails at a given write."""

    place = "memory"
    writers = 1

    def __init__(self, at_end: bool = False, fail_at: int | None = None):
        self.at_end, self.fail_at = at_end, fail_at
        self.writes: list[tuple[Key, list[int], str]] = []
        self.has: dict[Key, Held] = {}
        self.asked = 0

    def held(self) -> dict[Key, Held]:
        self.asked += 1
        return dict(self.has)

    def write(self, trial: TrackedTrial, after: int) -> None:
        if self.fail_at is not None and len(self.writes) == self.fail_at:
            raise ConnectionError("down")
        self.writes.append((trial.key, [point.epoch for point in trial.points[after:]], trial.status))
        self.has[trial.key] = Held(len(trial.points), trial.has_ended)


ALL = [
    (("trials", "sgd-b32-none", 0), [1, 2, 3, 4], "completed"),
    (("trials", "sgd-b32-none", 1), [1, 2], "pruned"),
    (("trials", "sgd-b32-none", 2), [1], "diverged"),
    (("trials", "sgd-b32-none", 3), [1, 2, 3], "running"),
    (("confirm", "sgd-b32-none", 0), [1, 2, 3, 4], "completed"),
]


def test_a_trial_has_its_values_curves_and_times(tmp_path: Path):
    folder = make_study(tmp_path / "s")
    run = add_trial(folder, 3, 2, factors={"model": "vgg9"})
    trial = tracked("tiny", "id", "trials", run, folder.epochs(run))
    assert trial.name == "trials/sgd-b32-none/0003"
    assert trial.parameters == {
        "optimizer": "sgd", "batch_size": 32, "smoothing": "none", "model": "vgg9", "learning_rate": 3.1, "seed": 7,
        "published": False,
    }  # fmt: skip
    assert [(point.epoch, point.time) for point in trial.points] == [(1, BEGAN + 2), (2, BEGAN + 4)]
    assert trial.points[1].values == {"epoch": 2, "val_loss": 3.5, "seconds": 2.0}  # what is not finite is left out
    assert (trial.began, trial.ended, trial.has_ended) == (BEGAN, BEGAN + 4, True)


def test_everything_is_told_once(tmp_path: Path):
    folder, tracker = make_mixed(tmp_path / "s"), Remembering()
    sync = Sync(folder, tracker)
    sync.once()
    assert tracker.writes == ALL
    assert sync.told == 5
    sync.once()
    Sync(folder, tracker).once()
    assert tracker.writes == ALL


def test_what_a_running_trial_adds_is_told(tmp_path: Path):
    folder, tracker = make_mixed(tmp_path / "s"), Remembering()
    sync = Sync(folder, tracker)
    sync.once()
    running = folder.trials()[3]
    add_epoch(folder, running, 4)
    sync.once()
    assert tracker.writes[5:] == [(("trials", "sgd-b32-none", 3), [4], "running")]
    running.status = "completed"
    folder.write_trial(running)
    sync.once()
    assert tracker.writes[6:] == [(("trials", "sgd-b32-none", 3), [], "completed")]


def test_epochs_that_are_redone_are_not_told_again(tmp_path: Path):
    folder, tracker = make_mixed(tmp_path / "s"), Remembering()
    sync = Sync(folder, tracker)
    sync.once()
    running = folder.trials()[3]
    folder.keep_epochs(running, 1)
    sync.once()
    assert tracker.writes == ALL
    for number in (2, 3, 4):
        add_epoch(folder, running, number)
    sync.once()
    assert tracker.writes[5:] == [(("trials", "sgd-b32-none", 3), [4], "running")]


@pytest.mark.parametrize("fail_at", range(5))
def test_after_a_failure_it_goes_on_without_repeats(fail_at: int, tmp_path: Path):
    folder, tracker = make_mixed(tmp_path / "s"), Remembering(fail_at=fail_at)
    sync = Sync(folder, tracker)
    with pytest.raises(ConnectionError):
        sync.once()
    assert len(tracker.writes) == fail_at
    tracker.fail_at = None
    sync.once()
    assert tracker.writes == ALL
    assert tracker.asked == 2  # it knows best what has reached it


def test_a_tracker_of_whole_trials_waits_for_their_ends(tmp_path: Path):
    folder, tracker = make_mixed(tmp_path / "s"), Remembering(at_end=True)
    sync = Sync(folder, tracker)
    sync.once()
    assert tracker.writes == [call for call in ALL if call[2] != "running"]
    running = folder.trials()[3]
    running.status = "pruned"
    folder.write_trial(running)
    sync.once()
    assert tracker.writes[4:] == [(("trials", "sgd-b32-none", 3), [1, 2, 3], "pruned")]


def test_records_of_ended_trials_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, read = make_mixed(tmp_path / "s"), []
    sync = Sync(folder, Remembering())
    sync.once()
    monkeypatch.setattr(folder_module, "checked", lambda content: read.append(json.loads(content)["number"]) or content)
    sync.once()
    assert read == [3]


def test_a_study_keeps_its_identity(tmp_path: Path):
    one, other = make_study(tmp_path / "one"), make_study(tmp_path / "other")
    assert identity(one) == identity(one) != identity(other)


def test_only_one_at_a_time_tells_a_tracker(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    with opened(folder, "tensorboard"), pytest.raises(StudyError, match="is being brought up to date already"):  # noqa: SIM117
        with opened(folder, "tensorboard"):
            pass


class TestCommand:
    """`lbstudy track`, and --track."""

    def test_trackers_that_the_study_names(self, tmp_path: Path, monkeypatch, capsys):
        memory = Remembering()
        monkeypatch.setattr("lbstudy.trackers.sync.open_tracker", lambda name, folder: memory)
        monkeypatch.setattr(trackers, "require", lambda names: None)
        make_mixed(tmp_path / "s")
        assert lbstudy(monkeypatch, "track", str(tmp_path / "s")) == 2
        assert "this study names no tracker" in capsys.readouterr().err
        assert lbstudy(monkeypatch, "track", str(tmp_path / "s"), "--to", "mlflow") == 0
        assert capsys.readouterr().out == "mlflow: 5 trials told, the others were up to date: memory\n"
        study = StudyFolder.open(tmp_path / "s").study()
        named = study.model_copy(update={"resources": study.resources.model_copy(update={"track": ["wandb"]})})
        StudyFolder.create(tmp_path / "s", named)
        assert lbstudy(monkeypatch, "track", str(tmp_path / "s")) == 0
        assert capsys.readouterr().out == "wandb: 0 trials told, the others were up to date: memory\n"

    def test_a_tracker_that_is_down_is_one_sentence(self, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr("lbstudy.trackers.sync.open_tracker", lambda name, folder: Remembering(fail_at=2))
        monkeypatch.setattr(trackers, "require", lambda names: None)
        make_mixed(tmp_path / "s")
        assert lbstudy(monkeypatch, "track", str(tmp_path / "s"), "--to", "mlflow") == 2
        assert capsys.readouterr().err == "error: mlflow: ConnectionError: down; the same command goes on from here\n"

    @pytest.mark.parametrize("command", ["run", "confirm", "track"])
    def test_a_missing_package_is_said_before_any_work(self, command: str, tmp_path: Path, monkeypatch, capsys):
        make_mixed(tmp_path / "s")
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(trackers, "find_spec", lambda name: None)
        option = "--to" if command == "track" else "--track"
        assert lbstudy(monkeypatch, command, str(tmp_path / "s"), option, "wandb") == 2
        error = capsys.readouterr().err
        assert error == (
            "error: tracker wandb: its package is not installed; install it with `uv sync --extra wandb`, or "
            "pip install 'lbstudy[wandb]'\n"
        )
        assert sorted(tmp_path.rglob("*")) == before

    def test_mlflow_needs_an_address(self, monkeypatch):
        monkeypatch.setattr(trackers, "find_spec", lambda name: True)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(StudyError, match="set MLFLOW_TRACKING_URI to the address of its server"):
            trackers.require(["mlflow"])

    def test_the_option_gets_into_the_study(self, tmp_path: Path, monkeypatch):
        from lbstudy.console import session

        make_mixed(tmp_path / "s")
        found, _ = session.resolve(str(tmp_path / "s"), None, None, None, None, None, None, ["mlflow", "wandb"])
        assert found.resources.track == ["mlflow", "wandb"]
