"""One driver per study: the lock that a running driver holds on the study's folder.

The lock is a file that names its holder (host, process, since when) and is touched every few seconds. It is stale, and
taken over, when its process is dead on this host or when nobody has touched it for a minute. No file locking of the
operating system: that is not to be relied on over NFS.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil

from lbstudy.records import LOCK
from lbstudy.study import StudyError

TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0


class DriverLock:
    """Held while a driver writes to a study's folder; use as a context manager.

    Args:
        folder: of the study; made where it is missing, and removed again, with those above it that were made for it,
            if it is still empty in the end.
        notice: is told when a dead driver's lock is taken over.
    """

    def __init__(self, folder: Path, notice: Callable[[str], None]):
        self._path, self._notice = folder / LOCK, notice
        self._made: list[Path] = []
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
        mine = {"host": platform.node(), "pid": process.pid, "created": process.create_time()}
        folder = self._path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        mine["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        while not self._create(json.dumps(mine)):
            holder = self._holder()
            if holder is not None and not self._is_stale(holder):
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
        with suppress(OSError):  # storage that has become read-only keeps the lock, which is stale from now on
            self._path.unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # not empty: the study has begun
            for folder in self._made:
                folder.rmdir()

    def _create(self, text: str) -> bool:
        try:
            out = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with out:
                out.write(text)
        except OSError:  # the disk is full
            self._path.unlink()
            raise
        return True

    def _holder(self) -> dict[str, object] | None:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _is_stale(self, holder: dict[str, object]) -> bool:
        if holder.get("host") == platform.node():
            try:
                alive = psutil.Process(int(str(holder["pid"]))).create_time() == holder["created"]
            except (psutil.NoSuchProcess, KeyError, ValueError):
                alive = False
            return not alive
        return time.time() - self._path.stat().st_mtime > STALE_SECONDS

    def _keep_touching(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            with suppress(OSError):  # gone, or not writable any more: the driver will learn that from its next record
                os.utime(self._path)
