"""One driver per study, tried for real: other process spaces, other clocks, other users, storage without links."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lbstudy import storage
from lbstudy.records import lock
from lbstudy.records.folder import LOCK, StudyFolder
from lbstudy.records.lock import DriverLock
from lbstudy.study.file import StudyError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is not touched for half a second is stale."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.05)


class TestLock:
    def test_second_driver_is_told_of_the_first(self, tmp_path: Path):
        with DriverLock(tmp_path / "s", print):
            with pytest.raises(StudyError, match=rf"host {platform.node()}, process {os.getpid()}, since 20"):
                DriverLock(tmp_path / "s", print).__enter__()
            (tmp_path / "s" / "study.yaml").write_text("")
        assert [p.name for p in (tmp_path / "s").iterdir()] == ["study.yaml"]

    def test_lock_of_a_dead_driver_is_taken_over_at_once(self, tmp_path: Path):
        hold = "import os, sys; from lbstudy.records.lock import DriverLock; from pathlib import Path;"
        hold += "DriverLock(Path(sys.argv[1]), print).__enter__(); os._exit(1)"
        dead = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)])
        dead.wait()
        notices: list[str] = []
        with DriverLock(tmp_path, notices.append):
            assert [str(dead.pid) in notice for notice in notices] == [True]

    def test_a_number_of_a_dead_process_that_another_has_now_is_told_apart(self, tmp_path: Path):
        holder = {"host": "here", "pid": os.getpid(), "space": lock._space(), "started": "17", "since": "then"}
        (tmp_path / LOCK).write_text(json.dumps(holder))
        assert not lock.is_held(tmp_path)
        with DriverLock(tmp_path, print):
            assert lock.is_held(tmp_path)

    @pytest.mark.parametrize("shift", [-7200, 0, 7200])
    def test_a_live_driver_elsewhere_keeps_its_lock_whatever_the_clocks_say(
        self, tmp_path: Path, shift: int, quick: None
    ):
        """Another machine, or another process space of this one, whose file server's clock is off."""
        holder = {"host": platform.node(), "pid": 1, "space": "another boot", "started": "1", "since": "then"}
        (tmp_path / LOCK).write_text(json.dumps(holder))
        ended = threading.Event()

        def beat() -> None:
            for number in range(10_000):
                os.utime(tmp_path / LOCK, (time.time() + shift + number / 100,) * 2)
                if ended.wait(0.05):
                    return

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            notices: list[str] = []
            with pytest.raises(StudyError, match="process 1, since then.*lbstudy unlock"):
                DriverLock(tmp_path, notices.append).__enter__()
            assert "watching for up to" in notices[0]
            with pytest.raises(StudyError, match="is at work here; --force"):
                lock.unlock(tmp_path, print)
        finally:
            ended.set()
            thread.join()
        assert lock.unlock(tmp_path, print, force=True)
        assert not lock.unlock(tmp_path, print)

    def test_a_dead_driver_elsewhere_loses_its_lock_however_young_that_is(self, tmp_path: Path, quick: None):
        holder = {"host": "elsewhere", "pid": 1, "created": 1.0, "since": "then"}  # as version 0.1 wrote it
        (tmp_path / LOCK).write_text(json.dumps(holder))
        os.utime(tmp_path / LOCK, (time.time() + 7200,) * 2)
        notices: list[str] = []
        with DriverLock(tmp_path, notices.append):
            pass
        words = "a driver (host elsewhere, process 1, since then)"
        assert notices == [
            f"{tmp_path}: watching for up to 0 s whether {words} is alive",
            f"{tmp_path}: taking over from {words} that has died",
        ]

    def test_a_driver_whose_lock_was_removed_stops(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.05)
        notices: list[str] = []
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                self.robbed(tmp_path, notices.append)
        finally:
            signal.signal(signal.SIGINT, before)
        assert "somebody has removed its lock; this driver stops" in notices[0]

    def robbed(self, folder: Path, notice: Callable[[str], None]) -> None:
        with DriverLock(folder, notice):
            assert lock.unlock(folder, print, force=True)
            for _ in range(400):  # short ones, for what the lock does to this thread comes between them
                time.sleep(0.05)

    def test_a_file_system_without_times_is_touched_by_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def refused(path: object, *arguments: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        (tmp_path / "f").write_bytes(b"lock")
        before = storage.stamp(tmp_path / "f")
        monkeypatch.setattr(os, "utime", refused)
        storage.touch(tmp_path / "f")
        assert storage.stamp(tmp_path / "f") != before
        assert (tmp_path / "f").read_bytes() == b"lock"

    def test_unused_folder_is_removed_again(self, tmp_path: Path):
        with DriverLock(tmp_path / "s", print):
            pass
        assert not (tmp_path / "s").exists()


def test_lock_leaves_nothing_of_what_it_made_and_all_of_what_was_there(tmp_path: Path):
    with pytest.raises(StudyError), DriverLock(tmp_path / "new" / "studies" / "s", print):
        raise StudyError("the study cannot begin")
    assert not list(tmp_path.iterdir())
    with DriverLock(tmp_path / "new" / "s", print):
        (tmp_path / "new" / "other").mkdir()  # another study begins beside it
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]
    with DriverLock(tmp_path / "new" / "other", print):
        pass
    assert (tmp_path / "new" / "other").is_dir()


def test_lock_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: bytes) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "create", full)
    with pytest.raises(StudyError, match="cannot be written: No space left on device"):
        DriverLock(tmp_path / "new" / "s", print).__enter__()
    assert not list(tmp_path.iterdir())


HOLD = """
import sys
from pathlib import Path
from lbstudy.records import lock
lock.TOUCH_SECONDS = 0.1
with lock.DriverLock(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""

SPACES = {
    "here": [],
    "another process space": ["unshare", "--pid", "--fork", "--mount-proc"],
    "another process space with the /proc of this one": ["unshare", "--pid", "--fork"],
    "another time since the boot": ["unshare", "--time", "--boottime", "100000", "--fork"],
    "another /proc/stat": ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/stat && exec "$@"', "STAT"],
}
"""How a process is begun somewhere else on this machine. lxcfs mounts /proc/stat, and a clock that steps changes it."""


def begin(folder: Path, *wrapper: str, **environment: str) -> subprocess.Popen[str]:
    """A driver, at work when this returns."""
    command = [*wrapper, sys.executable, "-c", HOLD, str(folder)]
    driver = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert driver.stdout is not None
    assert driver.stdout.readline() == "held\n"
    return driver


def kill(driver: subprocess.Popen[str]) -> None:
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()


def elsewhere(name: str, tmp_path: Path) -> list[str]:
    """The wrapper for such a space; skips where the system does not allow it."""
    (tmp_path / "stat").write_text(Path("/proc/stat").read_text().replace("btime 1", "btime 2"))
    wrapper = [str(tmp_path / "stat") if part == "STAT" else part for part in SPACES[name]]
    tried = subprocess.run([*wrapper, "true"], capture_output=True, text=True, check=False) if wrapper else None
    if tried is not None and tried.returncode:
        pytest.skip(f"not permitted here: {tried.stderr.strip()}")
    return wrapper


@pytest.mark.parametrize("space", SPACES)
def test_a_live_driver_keeps_its_study_and_a_dead_one_loses_it(space: str, tmp_path: Path, quick: None):
    wrapper, study = elsewhere(space, tmp_path), tmp_path / "s"
    driver = begin(study, *wrapper)
    try:
        for shift in (0, -7200, 7200):  # the times that a file server gives
            os.utime(study / LOCK, (time.time() + shift,) * 2)
            with pytest.raises(StudyError, match=f"host {platform.node()}.*is at work here"):
                DriverLock(study, print).__enter__()
    finally:
        kill(driver)
    notices: list[str] = []
    began = time.monotonic()
    with DriverLock(study, notices.append):
        assert "taking over" in notices[-1]
    at_once = space in ("here", "another /proc/stat")
    assert time.monotonic() - began < lock.STALE_SECONDS + 1
    assert len(notices) == (1 if at_once else 2)  # elsewhere it is watched first


def test_a_process_that_nobody_has_asked_how_it_ended_is_dead(tmp_path: Path):
    """As in a container whose first process does not care."""
    driver = begin(tmp_path / "s")
    os.killpg(driver.pid, signal.SIGKILL)
    while Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    try:
        assert not lock.is_held(tmp_path / "s")
    finally:
        driver.communicate()


def test_a_driver_that_may_not_be_seen_is_watched(tmp_path: Path, quick: None):
    """Another user's, where /proc hides those (`hidepid`)."""
    driver = begin(tmp_path / "s")
    holder = json.loads((tmp_path / "s" / LOCK).read_text())
    assert lock._is_dead(holder) is False
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=invisible proc /proc && exec "$@"', "sh"]
    see = "import json, os, sys; from lbstudy.records import lock; "
    see += "os.setgroups([]); os.setgid(65534); os.setuid(65534); "
    see += "print(lock._started(os.getppid()), lock._is_dead(json.loads(sys.argv[1])))"
    try:
        command = [*hidden, sys.executable, "-c", see, json.dumps(holder)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            pytest.skip(f"no other user to be here: {found.stderr.strip()[-200:]}")
        assert found.stdout == "None None\n"
    finally:
        kill(driver)


def test_a_lock_that_is_being_written_is_waited_for(tmp_path: Path, quick: None):
    (tmp_path / LOCK).write_text("")  # made by one who has not come to write it
    mine = {"host": "here", "pid": os.getpid(), "space": lock._space(), "started": lock._started(os.getpid())}
    writer = threading.Timer(0.2, lambda: (tmp_path / LOCK).write_text(json.dumps(mine)))
    writer.start()
    try:
        with pytest.raises(StudyError, match=rf"process {os.getpid()}.*is at work here"):
            DriverLock(tmp_path, print).__enter__()
    finally:
        writer.join()
    (tmp_path / LOCK).write_text("")
    with DriverLock(tmp_path, print):
        assert lock.is_held(tmp_path)


def test_of_those_who_find_a_dead_driver_one_takes_over(tmp_path: Path):
    dead = {"host": "here", "pid": os.getpid(), "space": lock._space(), "started": "17", "since": "then"}
    for _ in range(30):
        (tmp_path / LOCK).write_text(json.dumps(dead))
        barrier, locks = threading.Barrier(4), [DriverLock(tmp_path, lambda message: None) for _ in range(4)]

        def enter(one: DriverLock, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                one.__enter__()
            except StudyError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            entered = list(pool.map(enter, locks))
        assert entered.count(True) == 1
        locks[entered.index(True)].__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_one_who_was_faster_is_put_back(tmp_path: Path):
    (tmp_path / LOCK).write_text('{"pid": 2}')
    lock._take_away(tmp_path / LOCK, {"pid": 1})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(LOCK, '{"pid": 2}')]
    lock._take_away(tmp_path / LOCK, {"pid": 2})
    lock._take_away(tmp_path / LOCK, {"pid": 2})
    assert not list(tmp_path.iterdir())


def test_one_who_died_while_it_took_over_is_waited_for_no_longer_than_a_driver(tmp_path: Path, quick: None):
    (tmp_path / LOCK).write_text('{"pid": 2}')
    (tmp_path / f".{LOCK}-taking-over").touch()
    began = time.monotonic()
    lock._take_away(tmp_path / LOCK, {"pid": 2})
    assert lock.STALE_SECONDS <= time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_forgets_times_is_touched_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "f").write_bytes(b"lock")
    before = storage.stamp(tmp_path / "f")
    monkeypatch.setattr(os, "utime", lambda *arguments: None)
    storage.touch(tmp_path / "f")
    assert storage.stamp(tmp_path / "f") != before


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

static int plain(const char *path) {  /* lies on the storage without links, modes and times */
    const char *where = getenv("SHIM_STORAGE");
    return where && strncmp(path, where, strlen(where)) == 0;
}
#define REFUSE(path) if (plain(path)) { errno = EPERM; return -1; }
#define REAL(name) __typeof__(name) *real = dlsym(RTLD_NEXT, #name)

int symlink(const char *to, const char *path) { REFUSE(path) REAL(symlink); return real(to, path); }
int symlinkat(const char *to, int dir, const char *path) { REFUSE(path) REAL(symlinkat); return real(to, dir, path); }
int link(const char *to, const char *path) { REFUSE(path) REAL(link); return real(to, path); }
int linkat(int from, const char *to, int dir, const char *path, int flags) {
    REFUSE(path) REAL(linkat); return real(from, to, dir, path, flags);
}
int chmod(const char *path, mode_t mode) { REFUSE(path) REAL(chmod); return real(path, mode); }
int utimensat(int dir, const char *path, const struct timespec times[2], int flags) {
    if (path) { REFUSE(path) } REAL(utimensat); return real(dir, path, times, flags);
}
int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(clock_gettime);
    int answer = real(clock, time);
    if (clock == CLOCK_REALTIME && getenv("SHIM_SKEW")) time->tv_sec += atol(getenv("SHIM_SKEW"));
    return answer;
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that refuses what some storage does not have (below SHIM_STORAGE), and moves the clock by SHIM_SKEW."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "shim.so"


@pytest.mark.parametrize("skew", ["-7200", "7200"])
@pytest.mark.parametrize("space", ["here", "another process space"])
def test_a_clock_that_is_set_takes_no_lock(space: str, skew: str, shim: Path, tmp_path: Path, quick: None):
    wrapper, study = elsewhere(space, tmp_path), tmp_path / "s"
    driver = begin(study, *wrapper, LD_PRELOAD=str(shim), SHIM_SKEW=skew)
    try:
        since = datetime.fromisoformat(json.loads((study / LOCK).read_text())["since"])
        assert abs((since - datetime.now(UTC)).total_seconds() - int(skew)) < 60  # its clock is off indeed
        with pytest.raises(StudyError, match="is at work here"):
            DriverLock(study, print).__enter__()
    finally:
        kill(driver)


def test_storage_without_links_modes_and_times_has_a_lock(shim: Path, tmp_path: Path, quick: None):
    study = tmp_path / "s"
    environment = {"LD_PRELOAD": str(shim), "SHIM_STORAGE": str(tmp_path)}
    tried = subprocess.run(
        ["ln", "-s", "x", str(tmp_path / "link")], env=os.environ | environment, capture_output=True, check=False
    )
    assert b"Operation not permitted" in tried.stderr
    driver = begin(study, "unshare", "--pid", "--fork", **environment)
    try:
        first = storage.stamp(study / LOCK)
        with pytest.raises(StudyError, match="is at work here"):
            DriverLock(study, print).__enter__()
        assert storage.stamp(study / LOCK) != first
    finally:
        kill(driver)
    with DriverLock(study, print):
        pass


@pytest.mark.slow
def test_a_study_runs_on_storage_without_links_modes_and_times(shim: Path, tmp_path: Path):
    small = {
        "name": "tiny", "model": "lenet5", "dataset": {"name": "digits", "validation_size": 0.2},
        "budget": {"epochs": 2}, "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]},
        "search": {"learning_rate": {"log_uniform": [1e-3, 1e-1]}}, "tuning": {"trials": 2, "pruner": "none"},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(small))
    place = tmp_path / "exfat"
    environment = os.environ | {"LD_PRELOAD": str(shim), "SHIM_STORAGE": str(place)}
    command = [sys.executable, "-m", "lbstudy", "run", "study.yaml", "--storage", str(place)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [trial.status for trial in StudyFolder(place / "tiny").trials()] == ["completed"] * 2
