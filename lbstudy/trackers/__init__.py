"""Trackers that show a study's trials beside others': TensorBoard, MLflow, Weights & Biases. See docs/trackers.md.

A tracker is told of trials from the study's records, one run a trial: by a process of its own while a driver is at work
(`follow`), or afterwards (`lbstudy track`). What it holds already it is asked itself (`Tracker.held`), so nothing is
told twice, and what was lost or wiped on its side is told again. This package needs neither torch nor Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.spec import TrackerName
from lbstudy.trackers.trial import Key, TrackedTrial


class Held(NamedTuple):
    """How much of a trial a tracker has."""

    epochs: int
    ended: bool  # it knows that the trial has ended, and how


class Tracker(Protocol):
    """Where trials are shown. Every method may raise what its library raises."""

    at_end: bool
    """Whether a trial is told as a whole, once it has ended."""

    writers: int
    """How many trials may be written at a time, by threads."""

    @property
    def place(self) -> str:
        """Where its users find the runs, in words."""

    def held(self) -> dict[Key, Held]:
        """What it has of the study."""

    def write(self, trial: TrackedTrial, after: int) -> None:
        """Tell it the epochs of a trial after the first so many, and its end if it has ended."""


def require(names: Sequence[TrackerName]) -> None:
    """Make sure that trackers can be used here.

    Raises:
        StudyError: a package is missing, or a tracker's address.
    """
    for name in names:
        if find_spec(name) is None:
            raise StudyError(
                f"tracker {name}: its package is not installed; install it with `uv sync --extra {name}`, or "
                f"pip install 'lbstudy[{name}]'"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise StudyError(
            "tracker mlflow: set MLFLOW_TRACKING_URI to the address of its server, such as http://127.0.0.1:5000"
        )


def open_tracker(name: TrackerName, folder: StudyFolder) -> Tracker:
    """The tracker, for a study; nothing is asked of it yet."""
    if name == "tensorboard":
        from lbstudy.trackers.tensorboard import TensorBoard

        return TensorBoard(folder)
    if name == "mlflow":
        from lbstudy.trackers.mlflow import MLflow

        return MLflow(folder)
    from lbstudy.trackers.wandb import WeightsAndBiases

    return WeightsAndBiases(folder)
