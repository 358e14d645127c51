"""Trackers at a driver's side: processes of their own, which never hold it up, and which nobody leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lbstudy.trackers import follow
from lbstudy.trackers.follow import followed
from tests.trackers.made_up import add_epoch, make_mixed

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")

from lbstudy.trackers import Held
from lbstudy.trackers.tensorboard import TensorBoard


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_tracker_is_up_to_date_when_the_driver_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow, "PATIENCE", 120.0)
    folder, notices, before = make_mixed(tmp_path / "s"), [], children()
    with followed(folder, ["tensorboard"], notices.append):
        running = folder.trials()[3]
        add_epoch(folder, running, 4)
        running.status = "completed"
        folder.write_trial(running)
    assert notices == []
    assert TensorBoard(folder).held()["trials", "sgd-b32-none", 3] == Held(4, ended=True)
    assert children() <= before


def test_a_tracker_that_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow, "PATIENCE", 120.0)
    folder, notices = make_mixed(tmp_path / "s"), []
    place = tmp_path / "s" / "trackers" / "tensorboard" / "trials"
    place.parent.mkdir(parents=True)
    place.write_text("in its way")
    with followed(folder, ["tensorboard"], notices.append):
        deadline = time.monotonic() + 120
        while not notices and time.monotonic() < deadline:  # it is told while the study runs
            time.sleep(0.05)
        told = len(notices)
    assert told == len(notices) == 1
    assert notices[0].startswith("tensorboard lags behind (NotADirectoryError")
    assert notices[0].endswith(
        f"the study goes on, and lbstudy track {folder.path} --to tensorboard brings it up to date"
    )


def put_in_place_of_the_tracker(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And have little patience with it."""
    hanging = tmp_path / "hanging"
    hanging.write_text(script)
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(follow, "PATIENCE", 0.5)


def test_a_tracker_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_in_place_of_the_tracker("#!/bin/sh\nexec sleep 600\n", tmp_path, monkeypatch)
    folder, notices, before = make_mixed(tmp_path / "s"), [], children()
    began = time.monotonic()
    with followed(folder, ["tensorboard"], notices.append):
        assert time.monotonic() - began < 30
    assert time.monotonic() - began < 30
    assert len(notices) == 1
    assert "it takes longer than the study" in notices[0]
    assert children() <= before


def test_what_a_hanging_tracker_has_started_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It has the tracker's output open."""
    put_in_place_of_the_tracker("#!/bin/sh\nsleep 600 &\nexec sleep 600\n", tmp_path, monkeypatch)
    folder, notices, before = make_mixed(tmp_path / "s"), [], children()
    began = time.monotonic()
    with followed(folder, ["tensorboard"], notices.append):
        while len(children() - before) < 2:
            assert time.monotonic() - began < 30
    assert time.monotonic() - began < 30
    assert ["it takes longer than the study" in notice for notice in notices] == [True]
    assert children() <= before


def test_a_tracker_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    folder, notices = make_mixed(tmp_path / "s"), []
    with followed(folder, ["tensorboard"], notices.append):
        pass
    assert len(notices) == 1
    assert "its process has ended" in notices[0]


def test_a_killed_driver_leaves_no_tracker_behind(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    driver = f"""
import os, signal, psutil
from lbstudy.records.folder import StudyFolder
from lbstudy.trackers.follow import followed
with followed(StudyFolder.open({str(folder.path)!r}), ["tensorboard"], print):
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (tracker,) = map(int, killed.stdout.split())
    deadline = time.monotonic() + 120
    while psutil.pid_exists(tracker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(tracker)
    assert len(TensorBoard(folder).held()) == 5  # it has looked at the records once more


def test_ctrl_c_is_not_the_trackers(tmp_path: Path):
    folder, before = make_mixed(tmp_path / "s"), children()
    with followed(folder, ["tensorboard"], print):
        (tracker,) = children() - before
        assert os.getpgid(tracker) == tracker
