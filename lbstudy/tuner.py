"""All cells of a study on one Ray Tune `Tuner`: lanes, search, pruning, records. The only file importing ray.tune,
but for the search it drives.

Tune schedules; it keeps no truth. The driver writes every report into the study's records as it arrives.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables stay silent with verbose=0 only in the old engine
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ):
    # Ray's servers listen on all network interfaces, and who reaches them can run code. A private Ray therefore asks
    # for a token that only this process and its children know. Ray reads both when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no CSV, JSON and TensorBoard files beside ours
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")  # Tune's snapshots are not used
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial has no value
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune

from lbstudy.datasets import Dataset, training_samples
from lbstudy.lane import Job, Lane
from lbstudy.records import StudyFolder, TrialRecord, utc_now
from lbstudy.search import OBJECTIVE, StudyPruner, StudySearch, objective
from lbstudy.study import Cell, Resources, StudyError, StudySpec

HEAD_NODE = "node:__internal_head__"  # a resource that every Ray cluster has, on its head node
LANE_SHARE = 0.0001  # of it: lanes only wait and pass reports on, so they sit on the head and bind no CPU


def count_lanes(resources: Resources, nodes: Sequence[dict[str, float]]) -> int:
    """How many trials can run at the same time.

    Args:
        resources: what a trial occupies.
        nodes: the resources of each node, those an autoscaler may still add included.

    Raises:
        StudyError: not even one trial fits; says what is missing.
    """
    need = {"CPU": resources.cpus_per_worker, "GPU": float(resources.gpus_per_worker)}
    need = {kind: amount for kind, amount in need.items() if amount}
    fits = [min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in need.items()) for node in nodes]
    if sum(fits) >= resources.workers:
        return sum(fits) // resources.workers
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    if not sum(fits):
        largest = " and ".join(f"{max((n.get(k, 0) for n in nodes), default=0):g} {k}" for k in need)
        raise StudyError(f"resources: a worker needs {wanted}, but the most that a node has is {largest}")
    raise StudyError(
        f"resources.workers: a trial needs {resources.workers} workers of {wanted} each, "
        f"but the cluster has room for {sum(fits)}"
    )


def with_gpus(resources: Resources, nodes: Sequence[dict[str, float]]) -> Resources:
    """Resources with `gpus_per_worker: auto` decided: a GPU per worker where any node has one."""
    if resources.gpus_per_worker != "auto":
        return resources
    return resources.model_copy(update={"gpus_per_worker": float(any(node.get("GPU", 0) >= 1 for node in nodes))})


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of the nodes of the cluster, and of those that its autoscaler may still add."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()  # no public way to ask for the autoscaler's limits
    for group in config.node_group_configs if config else []:
        limit = group.max_count if group.max_count >= 0 else 1000
        nodes += [dict(group.resources)] * max(0, limit - len(nodes) + 1)
    return nodes


def connect(verbose: bool = False) -> None:
    """Join the Ray cluster at RAY_ADDRESS, or else start a private Ray on this machine.

    Raises:
        StudyError: no cluster answers at the address.
    """
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", **options)
        return
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(f"no Ray cluster answers at {address}: {error}") from error


def disconnect() -> None:
    """Leave the cluster, or end the private Ray."""
    ray.shutdown()


@dataclass(frozen=True)
class Plan:
    """What the driver must know of a study before it begins."""

    study: StudySpec  # with the resources decided
    dataset: Dataset
    epochs: dict[str, int]  # of a whole run, by cell name
    lanes: int


def plan(study: StudySpec, dataset: Dataset, nodes: Sequence[dict[str, float]]) -> Plan:
    """Fit a study to its data and the machines.

    Raises:
        StudyError: no node can hold a trial.
    """
    study = study.model_copy(update={"resources": with_gpus(study.resources, nodes)})
    samples = training_samples(study.dataset, dataset)
    epochs = {cell.name: study.budget.total_epochs(study.steps_per_epoch(cell, samples)) for cell in study.list_cells()}
    lanes = min(count_lanes(study.resources, nodes), len(epochs) * study.tuning.trials)
    return Plan(study, dataset, epochs, lanes)


class TrialActor(tune.Trainable):
    """Tune's end of a lane: the actor outlives its trials (`reuse_actors`), and its worker group with it."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the worker group; it comes up while the first trial waits for its first report."""
        self._metric, self._jobs = config["lane"]["metric"], count()
        resources = Resources.model_validate(config["lane"]["resources"])
        dataset, storage = config["lane"]["dataset"][0], config["lane"]["storage"]
        self._lane = Lane(resources, dataset, storage, name=f"lane-{self.trial_id}")
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same lane."""
        key = f"{next(self._jobs)} {new_config['cell']} {new_config['number']}"
        self._lane.begin(Job(key, new_config["run"], new_config["rungs"]))
        return True

    def step(self) -> dict[str, Any]:
        """The next epoch of the present trial: its report, what the search makes of it, and how the trial ended, if so.

        Raises:
            LaneError: the worker group has died; Tune ends this actor and gives the next trial a new lane.
        """
        report = self._lane.next_report()
        outcome = report.pop("outcome", None)
        result = {"report": report, "device": report.pop("device", ""), "done": outcome is not None}
        if outcome is not None:
            result["outcome"] = outcome
        if outcome != "failed":
            result |= {"epoch": report["epoch"], OBJECTIVE: objective(self._metric, report, outcome)}
        return result

    def cleanup(self) -> None:
        """End the worker group."""
        self._lane.end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks for one; a trial's state is its workers' business."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


class Recorder(tune.Callback):
    """Writes what Tune tells into the study's records, and shows it."""

    def __init__(self, folder: StudyFolder, plan: Plan, show: Callable[[TrialRecord], None]):
        self._folder, self._plan, self._show = folder, plan, show
        self._records: dict[str, TrialRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks into a snapshot that nobody reads

    def begin(
        self, trial_id: str, cell: Cell, number: int, params: dict[str, float], published: bool
    ) -> dict[str, Any]:
        """A trial that the search suggests: make its record, and the configuration for its lane."""
        study = self._plan.study
        seed = study.trial_seed(cell, number)
        run = study.run_spec(cell, params, seed).model_dump(mode="json")
        self._records[trial_id] = TrialRecord(
            cell.name, number, cell.optimizer, cell.batch_size, cell.smoothing, params, seed, run, published
        )
        rungs = study.tuning.rungs(self._plan.epochs[cell.name])
        return {"cell": cell.name, "number": number, "run": run, "rungs": rungs}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has a lane."""
        record = self._records[trial.trial_id]
        record.started = utc_now()
        self._write(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch, or the news that the trial has failed."""
        record = self._records[trial.trial_id]
        record.device = result["device"]
        record.status = result.get("outcome", "running")
        if record.status == "failed":
            record.error = result["report"]["error"]
            return
        report = dict(result["report"])
        record.fingerprint = report.pop("fingerprint", "")
        record.metrics = {name: value if math.isfinite(value) else None for name, value in report.items()}
        record.seconds += report["seconds"]
        self._folder.append_epoch(record, record.metrics)
        if record.status == "running":
            self._show(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended by itself, or the pruner ended it."""
        record = self._records.pop(trial.trial_id)
        if record.status == "running":
            record.status = "pruned"
        self._write(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's lane has died."""
        record = self._records.pop(trial.trial_id)
        record.status = "failed"
        record.error = Path(trial.error_file).read_text() if trial.error_file else "the lane died"
        self._write(record)

    def _write(self, record: TrialRecord) -> None:
        self._folder.write_trial(record)
        self._show(record)


def tune_study(folder: StudyFolder, plan: Plan, show: Callable[[TrialRecord], None], verbose: bool = False) -> None:
    """Run all trials of a study on the connected Ray.

    Args:
        folder: where the records go.
        plan: the study, checked.
        show: is told of every change of a trial.
        verbose: let Tune print.
    """
    study = plan.study
    recorder = Recorder(folder, plan, show)
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    lane_storage = folder.path / ".lanes"
    lane = {
        "resources": study.resources.model_dump(),
        "metric": study.tuning.metric,
        "storage": str(lane_storage.resolve()),
        "dataset": [ray.put(plan.dataset)],  # in a list, or Tune would resolve it into every trial's configuration
    }
    with tempfile.TemporaryDirectory(prefix="lbstudy-tune-") as scratch:
        try:
            tune.Tuner(
                tune.with_resources(TrialActor, tune.PlacementGroupFactory([{HEAD_NODE: LANE_SHARE}])),
                param_space={"lane": lane},
                tune_config=tune.TuneConfig(
                    num_samples=len(plan.epochs) * study.tuning.trials,
                    search_alg=StudySearch(study, storage, recorder.begin),
                    scheduler=StudyPruner(study, plan.epochs),
                    max_concurrent_trials=plan.lanes,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=study.name, storage_path=scratch, callbacks=[recorder], verbose=3 if verbose else 0
                ),
            ).fit()
        finally:
            shutil.rmtree(lane_storage, ignore_errors=True)
