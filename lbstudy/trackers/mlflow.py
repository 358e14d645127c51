"""MLflow: a run for each trial, in the experiment of the study's name, on the server at MLFLOW_TRACKING_URI.

Epochs go to the server some hundred values at a time, with the epoch's number as one of them, at the times that the
records know: a request that is made again, since its answer was lost, changes nothing there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lbstudy.records.folder import StudyFolder
from lbstudy.trackers import Held
from lbstudy.trackers.trial import Key, Point, TrackedTrial, identity

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

VALUES = 1000  # in a request, at most
OTHERS = 101  # of them, parameters and tags
PAGE = 1000  # runs in an answer
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; with MLflow's own values a request takes minutes to fail
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a run
}
"""What MLflow is told, where the user's environment does not say otherwise."""

ENDED = {"completed": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
"""MLflow's words for how a trial has ended; ours is the tag `lbstudy.status`."""


class MLflow:
    """A study's trials on an MLflow server."""

    at_end = False
    writers = 8

    def __init__(self, folder: StudyFolder):
        self._study, self._identity = folder.study().name, identity(folder)
        self._runs: dict[Key, str] = {}  # ids
        self._open: tuple[MlflowClient, str] | None = None

    @property
    def place(self) -> str:
        """Experiment and server."""
        return f"experiment {self._study} at {os.environ['MLFLOW_TRACKING_URI']}"

    def held(self) -> dict[Key, Held]:
        """What the server has."""
        client, experiment = self._connected()
        found, token = {}, None
        while True:
            mine = f"tags.`lbstudy.study` = '{self._identity}'"
            page = client.search_runs([experiment], mine, max_results=PAGE, page_token=token)
            for run in page:
                key = _key(run)
                self._runs[key] = run.info.run_id
                found[key] = Held(int(run.data.metrics.get("epoch", 0)), run.info.status != "RUNNING")
            if not (token := page.token):
                return found

    def write(self, trial: TrackedTrial, after: int) -> None:
        """Add to the trial's run, which is made where it is missing."""
        from mlflow.entities import Param, RunTag

        client, experiment = self._connected()
        if trial.key not in self._runs:
            run = client.create_run(experiment, _milliseconds(trial.began), self._tags(trial), trial.name)
            self._runs[trial.key] = run.info.run_id
        run_id = self._runs[trial.key]
        params = [] if after else [Param(name, str(value)) for name, value in trial.parameters.items()]
        tags = [RunTag("lbstudy.status", trial.status)]
        for points in _portions(trial.points[after:]) or [[]]:
            client.log_batch(run_id, [metric for point in points for metric in _metrics(point)], params, tags)
        if trial.has_ended:
            client.set_terminated(run_id, ENDED[trial.status], _milliseconds(trial.ended))

    def _connected(self) -> tuple[MlflowClient, str]:
        """The client, and the experiment's id; `held`, which comes first, makes them."""
        if self._open is None:
            os.environ.update(ENVIRONMENT | os.environ)
            from mlflow.tracking import MlflowClient

            client = MlflowClient()
            known = client.get_experiment_by_name(self._study)
            self._open = client, known.experiment_id if known else client.create_experiment(self._study)
        return self._open

    def _tags(self, trial: TrackedTrial) -> dict[str, str]:
        kind, cell, number = trial.key
        tags = {"study": self._identity, "kind": kind, "cell": cell, "number": str(number), "status": "running"}
        return {f"lbstudy.{name}": value for name, value in tags.items()}


def _key(run: Run) -> Key:
    tags = run.data.tags
    return tags["lbstudy.kind"], tags["lbstudy.cell"], int(tags["lbstudy.number"])


def _metrics(point: Point) -> list[object]:
    from mlflow.entities import Metric

    return [Metric(name, value, _milliseconds(point.time), point.epoch) for name, value in point.values.items()]


def _portions(points: list[Point]) -> list[list[Point]]:
    """Whole epochs, as many as a request takes."""
    size = max(1, (VALUES - OTHERS) // max([1, *(len(point.values) for point in points)]))
    return [points[first : first + size] for first in range(0, len(points), size)]


def _milliseconds(time: float) -> int:
    return round(1000 * time)
