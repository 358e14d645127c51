"""Folders among the temporary files, and an end of those that killed processes have left there.

Whether the process that made one is alive, a lock of the operating system tells: it ends with the process, however that
ends. The temporary folder is on this machine, so such locks hold there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "lbstudy-"
MARK = ".in-use"


@contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """A new folder that is gone in the end; before it is made, those that nobody uses any more are removed.

    Args:
        what: it is for; a part of its name.
    """
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{what}-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with (folder / f"{MARK}-soon").open("x") as mark:
            with suppress(OSError):  # a file system without locks: then the folder is never taken for abandoned
                fcntl.flock(mark, fcntl.LOCK_EX)
                os.rename(mark.name, folder / MARK)  # from here on others look at it
            yield folder


def _remove_abandoned() -> None:
    """Remove such folders whose process has ended; those of other users stay."""
    for mark in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{MARK}"):
        with suppress(OSError), mark.open("r+") as opened:  # another user's, or one that is being removed right now
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)
