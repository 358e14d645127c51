"""Optuna's journal of a study as its driver keeps it: `optuna.journal`, which `optuna-dashboard` opens.

Optuna's own backend expects several writers: for each entry it takes a lock, opens the file, waits for the disk, and
reads back what it has written. Here the driver alone writes, and a journal is made anew from the records whenever a
study goes on, so none of it is needed: an entry is one write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, BinaryIO

from optuna.storages.journal import BaseJournalBackend


class DriverJournal(BaseJournalBackend):
    """A journal with one writer, for one `JournalStorage`.

    Args:
        out: the file, which must be empty.
    """

    def __init__(self, out: BinaryIO):
        self._out = out
        self._unread: list[dict[str, Any]] = []

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries; other processes may read them from now on."""
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        self._out.write("".join(f"{line}\n" for line in lines).encode())
        self._out.flush()
        self._unread += map(json.loads, lines)  # what whoever opens the file will get

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The entries that have not been read yet: a storage asks for each once, in their order."""
        logs, self._unread = self._unread, []
        return logs
