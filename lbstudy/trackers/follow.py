"""Trackers while a driver is at work: a process of its own for each, which reads the study's records.

So a tracker that is down, slow, or takes its process with it cannot hold up the study. The process ends when the driver
closes its input, or is gone; before it ends it looks at the records once more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from shlex import quote

from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import TrackerName
from lbstudy.trackers.sync import opened
from lbstudy.trackers.trial import identity

INTERVAL = 5.0  # seconds between two looks at the records
LONGEST = 60.0  # between two tries of a tracker that fails
SHARE = 4  # looking takes one part of so many of the time at most
PATIENCE = 20.0  # seconds that a driver that has ended gives its trackers
HASTE = 3.0  # the same, of one that is interrupted
NICE = 10  # the study comes first


@contextmanager
def followed(folder: StudyFolder, names: Sequence[TrackerName], notice: Callable[[str], None]) -> Iterator[None]:
    """Around a driver's work on a study: trackers follow its records.

    Args:
        folder: the study's folder.
        names: the trackers.
        notice: is told once of each tracker that lags behind.
    """
    if names:
        identity(folder)  # before several ask for it
    followers = [_Follower(folder, name, notice) for name in names]
    patience = HASTE
    try:
        yield
        patience = PATIENCE
    finally:
        until = time.monotonic() + patience
        for follower in followers:
            follower.let_go()
        for follower in followers:
            follower.end(until)


class _Follower:
    """The driver's end of a tracker's process."""

    def __init__(self, folder: StudyFolder, name: TrackerName, notice: Callable[[str], None]):
        self._folder, self._name, self._notice = folder, name, notice
        self._lags = False
        command = [sys.executable, "-m", "lbstudy.trackers", str(folder.path), name]
        self._process = subprocess.Popen(  # in a session of its own: Ctrl-C is the driver's
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, name=f"tracker-{name}", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._say(line.strip())
        if self._process.wait() and not self._lags:
            self._say("its process has ended")

    def _say(self, reason: str) -> None:
        if not self._lags:
            self._lags = True
            command = f"lbstudy track {quote(str(self._folder.path))} --to {self._name}"
            self._notice(f"{self._name} lags behind ({reason}); the study goes on, and {command} brings it up to date")

    def let_go(self) -> None:
        """No more is to come."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self, until: float) -> None:
        """Wait for the process until a time of the monotonic clock, and no longer."""
        self._listener.join(max(0.0, until - time.monotonic()))
        if self._listener.is_alive():
            self._say("it takes longer than the study")
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started, which holds its output open
            self._listener.join(HASTE)


def follow(folder: StudyFolder, name: TrackerName) -> int:
    """What the process does: keep a tracker up to date until standard input is closed; prints why it lags, if it does.

    Returns:
        The exit code: 0 if the tracker is up to date.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    driver, sys.stdout = sys.stdout, sys.stderr  # where the trackers' libraries print is not the driver's
    last, wait = threading.Event(), INTERVAL

    def await_end() -> None:
        sys.stdin.read()  # until the driver closes it, or ends
        last.set()

    threading.Thread(target=await_end, daemon=True).start()
    while True:
        try:
            with opened(folder, name) as (sync, _):
                while True:
                    ending, began = last.is_set(), time.monotonic()
                    sync.once()
                    if ending:
                        return 0
                    wait = max(INTERVAL, (SHARE - 1) * (time.monotonic() - began))
                    last.wait(wait)
        except Exception as error:  # whatever a tracker's library raises: it is tried again, and the driver says so
            print(_in_a_line(error), file=driver, flush=True)
            if last.is_set():
                return 1
            wait = min(2 * wait, LONGEST)
            last.wait(wait)


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
