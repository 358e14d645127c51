"""One driver per study: the lock that a running driver holds on the study's folder.

The lock is a file that names its holder and is touched every few seconds. Whether a holder is alive is told without
any clock but one's own: on the same boot of the same machine, and in the same spaces of processes and of time, by
whether its process is there (its number and the tick of its start); everywhere else by watching for a minute whether
the lock is touched. So neither a clock that is set, nor a container, nor a file server whose clock is off takes the
lock from a live driver.
No file locking of the operating system: that is not to be relied on over NFS. In an object store two drivers that begin
in the same moment might both believe that they hold the lock (see `storage.create`), as might two that take over from
the same dead one; one of them notices, and stops, when it touches it.
"""

from __future__ import annotations

import _thread
import json
import os
import platform
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from lbstudy import storage
from lbstudy.records.folder import LOCK
from lbstudy.storage import StoragePath
from lbstudy.study.file import StudyError, writing

TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0
WATCH_SECONDS = 1.0  # between two looks at another's lock
SPACES = [name for name in ("pid", "time") if os.path.lexists(f"/proc/self/ns/{name}")]


def is_held(folder: StoragePath) -> bool:
    """Whether a driver is at work on the study in a folder, as far as can be told from here and now: that of another
    machine by the age of its lock, which clocks may get wrong."""
    path = folder / LOCK
    if (holder := _holder(path)) is None:
        return False
    dead = _is_dead(holder)
    return storage.age(path) <= STALE_SECONDS if dead is None else not dead


def unlock(folder: StoragePath, notice: Callable[[str], None], force: bool = False) -> bool:
    """Remove the lock of a study whose driver has died; a driver that is alive after all stops when it notices.

    Args:
        folder: of the study.
        notice: is told that the lock is watched.
        force: remove it though its holder is alive.

    Returns:
        Whether there was a lock.

    Raises:
        StudyError: its holder is alive.
    """
    path = folder / LOCK
    if not path.is_file():
        return False
    holder = _holder(path)
    if holder is not None and not force and _is_alive(path, holder, notice):
        raise StudyError(f"{folder}: {_in_words(holder)} is at work here; --force takes its lock away, and it stops")
    path.unlink(missing_ok=True)
    return True


def _holder(path: StoragePath) -> dict[str, object] | None:
    """What a lock says; None where there is no lock any more, or a damaged one."""
    try:
        return dict(json.loads(storage.read(path) or b""))
    except (ValueError, TypeError):
        return None


def _in_words(holder: dict[str, object] | None) -> str:
    if holder is None:
        return "whoever has written an unreadable lock"
    return f"a driver (host {holder.get('host')}, process {holder.get('pid')}, since {holder.get('since')})"


def _space() -> str | None:
    """The boot of this machine, and the spaces of processes and of time (which moves the ticks of starts) in it; None
    where the system does not tell, or its /proc is about another process space."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{name}") for name in SPACES)])
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this process space was started, in ticks since the boot, empty if it has ended and nobody has
    asked how; None where that cannot be seen."""
    try:
        state, *_, started = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:20]
    except (OSError, ValueError):
        return None
    return "" if state in "ZX" else started


def _exists(pid: int) -> bool:
    """Whether there is such a process; a /proc that hides those of other users would not tell."""
    try:
        os.kill(pid, 0)  # no signal
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_dead(holder: dict[str, object]) -> bool | None:
    """Whether a lock's holder has died; None where only watching tells."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or holder.get("space") is None or holder["space"] != _space():
        return None
    if not _exists(pid):
        return True
    started = _started(pid)
    return None if started is None else started != holder.get("started")


def _is_alive(path: StoragePath, holder: dict[str, object] | None, notice: Callable[[str], None]) -> bool:
    """Whether a lock's holder is alive; watches the lock where there is no other way. An unreadable one may be one that
    is being written."""
    if holder is not None and (dead := _is_dead(holder)) is not None:
        return not dead
    notice(f"{path.parent}: watching for up to {STALE_SECONDS:.0f} s whether {_in_words(holder)} is alive")
    seen, until = storage.stamp(path), time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(WATCH_SECONDS)
        if storage.stamp(path) != seen:  # touched, removed, or another's
            return True
    return False


def _take_away(path: StoragePath, holder: dict[str, object] | None) -> None:
    """Remove the lock of a dead holder; what another driver has put in its place stays. Of several who want to, one at
    a time may look and remove, so that nobody's new lock goes instead."""
    claim = path.with_name(f".{path.name}-taking-over")
    until = time.monotonic() + STALE_SECONDS
    while not storage.create(claim, b""):
        if time.monotonic() > until:  # whoever made it has died
            claim.unlink(missing_ok=True)
        time.sleep(0.05)
    try:
        if _holder(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)


class DriverLock:
    """Held while a driver writes to a study's folder; use as a context manager.

    Args:
        folder: of the study; made where it is missing, and removed again, with those above it that were made for it,
            if it is still empty in the end.
        notice: is told when a dead driver's lock is taken over, and when another driver has taken over this one's;
            then the main thread is interrupted, as by Ctrl-C.
    """

    def __init__(self, folder: StoragePath, notice: Callable[[str], None]):
        self._path, self._notice = folder / LOCK, notice
        self._mine: dict[str, object] = {}
        self._made: list[StoragePath] = []
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_touching, name="driver-lock", daemon=True)

    def __enter__(self) -> DriverLock:
        """Take the lock.

        Raises:
            StudyError: another driver holds it; names its host, process and since when. Or the folder cannot be
                written.
        """
        with writing(self._path.parent):
            try:
                self._take()
            except OSError:
                self._remove_folders()
                raise
        self._thread.start()
        return self

    def _take(self) -> None:
        self._mine = {
            "host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "space": _space(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"), "token": uuid4().hex,
        }  # fmt: skip
        self._made = storage.make_folder(self._path.parent)
        while not storage.create(self._path, json.dumps(self._mine).encode()):
            seen = _holder(self._path)
            if not _is_alive(self._path, seen, self._notice):
                self._notice(f"{self._path.parent}: taking over from {_in_words(seen)} that has died")
                _take_away(self._path, seen)
            elif holder := _holder(self._path):  # or it has ended meanwhile
                raise StudyError(
                    f"{self._path.parent}: {_in_words(holder)} is at work here; if it is known to be gone: "
                    f"lbstudy unlock {shlex.quote(str(self._path.parent))}"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # it cannot be reached, or has become read-only: the lock is stale from now on
            if _holder(self._path) == self._mine:
                self._path.unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # not empty: the study has begun
            for folder in self._made:
                folder.rmdir()

    def _keep_touching(self) -> None:
        missed = 0  # looks in a row that saw no lock; one may be a moment in which somebody writes it
        while not self._released.wait(TOUCH_SECONDS):
            try:
                holder = _holder(self._path)
                if holder == self._mine:
                    storage.touch(self._path)
                    missed = 0
                    continue
            except OSError:  # the next time may do
                continue
            if holder is None and not missed:
                missed += 1
                continue
            what = "somebody has removed its lock" if holder is None else f"{_in_words(holder)} has taken over"
            self._notice(f"{self._path.parent}: {what}; this driver stops")
            _thread.interrupt_main()
            return
