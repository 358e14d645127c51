"""When a driver's changes to a study's folder are made: at once, or in threads, where each takes a request.

A request to an object store takes some 30 ms, and the driver has one thread for all lanes. In threads, the changes to
one trial are made one after the other, in their order, and those to several trials at the same time. So a driver that
dies has lost the last changes to a trial, none before one that is there: to the records it looks as if it had died a
moment earlier. Who reads a trial waits for its changes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lbstudy import storage
from lbstudy.storage import ObjectPath, StoragePath

Change = Callable[[], object]

AHEAD = 4 * storage.READERS
"""Changes that may wait; who has more waits with them."""


class Writes:
    """Changes are made at once."""

    def do(self, trial: str, change: Change) -> None:
        """Make a change.

        Args:
            trial: what it is about.
            change: makes it.

        Raises:
            OSError: it fails, or one before it has failed.
        """
        change()

    def wait(self, trial: str | None = None) -> None:
        """Until all changes to a trial, or to all, have been made.

        Raises:
            OSError: one has failed.
        """


class ThreadedWrites(Writes):
    """Changes are made in threads, those to one trial in their order. What follows one that has failed is not made."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(storage.READERS, thread_name_prefix="records")
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Change]] = {}  # by trial; the first of each is being made
        self._error: BaseException | None = None

    def do(self, trial: str, change: Change) -> None:
        """Make a change after those to its trial that came before."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or sum(map(len, self._waiting.values())) < AHEAD)
            self._raise()
            behind = trial in self._waiting
            self._waiting.setdefault(trial, deque()).append(change)
        if not behind:
            self._pool.submit(self._make, trial)

    def wait(self, trial: str | None = None) -> None:
        """Until all changes to a trial, or to all, have been made."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or (trial not in self._waiting if trial else not self._waiting))
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _make(self, trial: str) -> None:
        """Make the changes to a trial, as long as there are any."""
        while True:
            with self._changed:
                if self._error is not None or not self._waiting[trial]:
                    del self._waiting[trial]
                    self._changed.notify_all()
                    return
                change = self._waiting[trial][0]
            try:
                change()
            except BaseException as error:  # told to the driver's thread
                with self._changed:
                    self._error = self._error or error
            with self._changed:
                self._waiting[trial].popleft()
                self._changed.notify_all()


def writes_for(path: StoragePath) -> Writes:
    """How a driver writes to a folder: a file system takes changes at once."""
    return ThreadedWrites() if isinstance(path, ObjectPath) else Writes()
