"""Ctrl-C, SIGTERM, with which clusters end jobs, and SIGHUP, when a terminal is closed: the first ends a study in good
order, a second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Somebody wants this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as a shell reports a process that a signal has ended


@contextmanager
def interruptible() -> Iterator[None]:
    """Around work that starts processes: none of them is left when a signal ends it.

    The first signal ends the process soon, so the handlers stay: a second one may come while Python tidies up.

    Raises:
        Interrupted: after the first signal, which the work sees as a KeyboardInterrupt (Ray's code turns every
            exception of a handler into one). A second one ends the process there and then.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]  # as nohup has set it
    first: int | None = None
    others = psutil.Process().children()  # this process may have had some of its own, which go on

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is not None and number == signal.SIGHUP:
            return  # a terminal that closes may send several
        if first is not None:
            _kill_children(others)
            os._exit(128 + number)
        first = number
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != signal.SIGTERM:
            raise
        first = first or signal.SIGTERM  # while Ray starts, a handler of its own is there, which raises SystemExit
        _kill_children(others)
        raise Interrupted(first) from error
    finally:
        if first is None:
            for number, handler in before.items():
                signal.signal(number, handler)


def _kill_children(others: Sequence[psutil.Process]) -> None:
    """What Ray has started and, interrupted in its start or shut-down, would leave; parents before their children."""
    for started in psutil.Process().children():
        if started not in others:
            _kill(started)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.suspend()  # or it may start one more between the two
        children = process.children()
        process.kill()
        for child in children:
            _kill(child)
