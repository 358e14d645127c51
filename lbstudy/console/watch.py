"""What `lbstudy watch` does: the report of a study that runs, again and again, from its records alone."""

from __future__ import annotations

import time

import typer

from lbstudy.console.interrupt import Interrupted, interruptible
from lbstudy.console.session import err
from lbstudy.records.folder import StudyFolder
from lbstudy.records.provenance import utc_now

SHARE = 4
"""Making pages takes one part of so many of the time at most: the machine may be the one that trains."""


def watch_study(folder: StudyFolder, interval: int) -> None:
    """Write the page until the study is complete.

    Args:
        folder: the study's folder.
        interval: seconds from one page to the next.

    Raises:
        typer.Exit: Ctrl-C or SIGTERM.
        StudyError: the page cannot be written.
    """
    from lbstudy.analysis import load
    from lbstudy.analysis.report import page
    from lbstudy.analysis.tables import cost

    every = interval
    try:
        with interruptible():
            while True:
                began = time.monotonic()
                seen = load.Snapshot(folder)
                now = cost.standing(seen)
                made = utc_now()
                live = None if now.complete else page.Live(now.at_work, cost.progress_sentences(now), every, made)
                path = page.write(seen, live)
                if now.complete:
                    err.print(f"complete: {now.ended} of {now.wanted} trials; the report is {path}")
                    return
                at_work = f"{len(now.running)} running" if now.at_work else "no driver at work"
                err.print(f"{made[11:19]}  {now.ended}/{now.wanted} trials, {at_work}: {path}")
                took = time.monotonic() - began
                every = max(interval, round(SHARE * took))
                time.sleep(max(0.0, every - took))
    except Interrupted as interrupted:
        err.print(f"interrupted by {interrupted}; the last page stays")
        raise typer.Exit(interrupted.exit_code) from interrupted
