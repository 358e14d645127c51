"""One driver per study: the lock that a running driver holds on the study's folder.

The lock is a file that names its holder (host, process, since when) and is touched every few seconds. It is stale, and
taken over, when its process is dead on this host or when nobody has touched it for a minute. No file locking of the
operating system: that is not to be relied on over NFS. In an object store two drivers that begin in the same moment
might both believe that they hold the lock (see `storage.create`); one of them notices, and stops, when it touches it.
"""

from __future__ import annotations

import _thread
import json
import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType

import psutil

from lbstudy import storage
from lbstudy.records.folder import LOCK
from lbstudy.storage import StoragePath
from lbstudy.study.file import StudyError

TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0


def is_held(folder: StoragePath) -> bool:
    """Whether a driver is at work on the study in a folder, as far as can be told from here."""
    path = folder / LOCK
    holder = _holder(path)
    return holder is not None and not _is_stale(path, holder)


def _holder(path: StoragePath) -> dict[str, object] | None:
    """What a lock says; None where there is no lock any more, or a damaged one."""
    try:
        return dict(json.loads(storage.read(path) or b""))
    except (ValueError, TypeError):
        return None


def _is_stale(path: StoragePath, holder: dict[str, object]) -> bool:
    if holder.get("host") == platform.node():
        try:
            alive = psutil.Process(int(str(holder["pid"]))).create_time() == holder["created"]
        except (psutil.NoSuchProcess, KeyError, ValueError):
            alive = False
        return not alive
    return storage.age(path) > STALE_SECONDS


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
        try:
            self._take()
        except OSError as error:
            self._remove_folders()
            raise StudyError(f"{self._path.parent}: cannot be written: {error.strerror or error}") from error
        self._thread.start()
        return self

    def _take(self) -> None:
        process = psutil.Process()
        self._mine = {"host": platform.node(), "pid": process.pid, "created": process.create_time()}
        folder = self._path.parent
        self._made = storage.make_folder(folder)
        self._mine["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        while not storage.create(self._path, json.dumps(self._mine).encode()):
            holder = _holder(self._path)
            if holder is not None and not _is_stale(self._path, holder):
                raise StudyError(
                    f"{self._path.parent}: a driver is at work here: host {holder.get('host')}, "
                    f"process {holder.get('pid')}, since {holder.get('since')}"
                )
            self._notice(f"taking over from a driver that has died: {holder or 'unreadable lock'}")
            self._path.unlink(missing_ok=True)

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
        while not self._released.wait(TOUCH_SECONDS):
            try:
                holder = _holder(self._path)
                if holder == self._mine:
                    storage.touch(self._path)
            except OSError:  # the next time may do
                continue
            if holder is not None and holder != self._mine:
                self._notice(f"{self._path.parent}: another driver has taken over: {holder}; this one stops")
                _thread.interrupt_main()
                return
