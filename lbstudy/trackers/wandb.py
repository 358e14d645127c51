"""Weights & Biases: its own offline files, a run for each trial that has ended, in the study's folder.

    wandb sync STUDY/trackers/wandb/*/*/*/offline-run-*

uploads them, and passes over those that it has uploaded. A run is made in a scratch folder and stored as one file in
one step, so it is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from lbstudy import storage
from lbstudy.records.folder import StudyFolder
from lbstudy.scratch import scratch_folder
from lbstudy.trackers import Held
from lbstudy.trackers.trial import Key, TrackedTrial, identity, trackers_folder

GOOD = ("completed", "pruned")


class WeightsAndBiases:
    """Offline runs of a study's trials."""

    at_end = True
    writers = 1

    def __init__(self, folder: StudyFolder):
        self._root, self._identity = trackers_folder(folder) / "wandb", identity(folder)

    @property
    def place(self) -> str:
        """The command that uploads them."""
        return f"wandb sync {self._root}/*/*/*/offline-run-*"

    def held(self) -> dict[Key, Held]:
        """The runs that are there."""
        found = {}
        for path in self._root.glob("*/*/*/*/run-*.wandb"):
            kind, cell, number = path.parent.parent.parent.parent, path.parent.parent.parent, path.parent.parent
            found[kind.name, cell.name, int(number.name)] = Held(0, ended=True)
        return found

    def write(self, trial: TrackedTrial, after: int) -> None:
        """Make the trial's run."""
        import wandb

        kind, cell, _ = trial.key
        run_id = hashlib.sha256(f"{self._identity}/{trial.name}".encode()).hexdigest()[:16]
        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True, save_code=False)
        with _hooks_restored(), scratch_folder("wandb") as scratch:
            run = wandb.init(
                mode="offline", dir=str(scratch), project=trial.study, group=cell, job_type=kind, name=trial.name,
                id=run_id, config=trial.parameters, tags=[trial.status], settings=quiet, reinit="finish_previous",
            )  # fmt: skip
            for point in trial.points:
                run.log(point.values, step=point.epoch)
            run.summary["status"] = trial.status
            run.finish(exit_code=0 if trial.status in GOOD else 1)
            wandb.teardown()  # the run's file is complete when the process that writes it has ended, not before
            (made,) = scratch.glob("wandb/offline-run-*/run-*.wandb")
            began = datetime.fromtimestamp(trial.began, UTC)
            path = self._root / trial.name / f"offline-run-{began:%Y%m%d_%H%M%S}-{run_id}" / made.name
            storage.make_folder(path.parent)
            storage.write(path, made.read_bytes())


@contextmanager
def _hooks_restored() -> Iterator[None]:
    """Every run of W&B's wraps `sys.exit` and the hook of exceptions once more, and leaves it so: a thousand are more
    than Python can call."""
    exit_, excepthook = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = exit_, excepthook
