"""All cells of a study on one Ray Tune `Tuner`: lanes, search, pruning, records. The only file importing ray.tune,
but for the search it drives.

Tune schedules; it keeps no truth. The driver writes every report into the study's records as it arrives.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from optuna.storages import JournalStorage
from ray import tune
from ray._private.services import canonicalize_bootstrap_address_or_die  # no public way to ask what `auto` is
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # nor whether it is a Ray: as `ray health-check` does
from ray.tune.schedulers import TrialScheduler
from ruamel.yaml import YAML

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.scratch import scratch_folder
from lbstudy.storage import local_file
from lbstudy.study.file import StudyError
from lbstudy.study.objective import objective, time_so_far
from lbstudy.study.run import TrainOn
from lbstudy.study.spec import Resources, StudySpec, Tuning
from lbstudy.training.datasets import Datasets, source, training_samples
from lbstudy.tuning.groups import own_job, sweep
from lbstudy.tuning.journal import DriverJournal
from lbstudy.tuning.lane import Job, Lane, LaneBroken, LaneError, LaneWaits
from lbstudy.tuning.promotion import promote
from lbstudy.tuning.pruner import StudyPruner
from lbstudy.tuning.recorder import BROKEN, MOVED, WAITS, Recorder, take_up
from lbstudy.tuning.resources import count_lanes, this_machine, with_gpus
from lbstudy.tuning.search import ELAPSED, OBJECTIVE, StudySearch, TrialQueue
from lbstudy.tuning.supervisor import LOOK_SECONDS, Supervisor

JOIN_SECONDS = 15.0
HEAD_NODE = "node:__internal_head__"  # a resource that every Ray cluster has, on its head node
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
STATES = ("checkpoint", "kept", "model", "best")  # what a report may bring, in the object store
MACHINE = ("device", "workers", "memory", "device_memory")  # what it says of where it comes from
LANE_SHARE = 0.0001  # of it: lanes only wait and pass reports on, so they sit on the head and bind no CPU


def cluster_nodes(bootstrap: Path = BOOTSTRAP, avoid: Sequence[str] = ()) -> list[dict[str, float]]:
    """Resources of the nodes of the cluster, and of those that its autoscaler may still add.

    Args:
        avoid: nodes that do not count, by Ray's ids.
        bootstrap: the configuration that `ray up` leaves on the head, where the driver runs. Ray has no other way to
            ask for an autoscaler's limits.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoid]
    bootstrap = Path(os.path.expanduser(bootstrap))  # which leaves it alone where there is no home
    if "RAY_ADDRESS" not in os.environ or not bootstrap.is_file():
        return nodes
    config = YAML(typ="safe", pure=True).load(bootstrap.read_text(encoding="utf-8"))
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    room = int(config.get("max_workers", 0)) - (len(nodes) - 1)
    for kind in workers.values():
        alike = sum(all(node.get(r, 0) == amount for r, amount in kind["resources"].items()) for node in nodes)
        more = max(0, min(room, int(kind.get("max_workers", 0)) - alike))
        nodes, room = nodes + [dict(kind["resources"])] * more, room - more
    return nodes


def connect(verbose: bool = False) -> None:
    """Join the Ray cluster at RAY_ADDRESS, or else start a private Ray on this machine.

    Raises:
        StudyError: no cluster answers at the address, or Ray does not start.
    """
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    ray._private.worker._worker_logs_enabled = verbose  # or it would print the nodes' warnings even so
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # calls a try that failed an incomplete trial
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        _require_answer(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    private: dict[str, Any] = {"address": "local", "include_dashboard": False}  # 11 processes that nothing here asks
    if address is None:
        private["num_cpus"] = int(this_machine()["CPU"])
    for more_tries in (2, 1, 0) if address is None else (0,):  # on a busy machine its servers may come up too late
        try:
            ray.init(**(private if address is None else {"address": address}), **options)
            break
        except Exception as error:  # it raises no narrower kind
            ray.shutdown()
            if "AF_UNIX path" in str(error):
                name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
                raise StudyError(
                    f"Ray's sockets need a shorter path than that of the temporary folder, {os.environ.get(name)} "
                    f"({name}); set RAY_TMPDIR to a shorter one, such as /tmp"
                ) from error
            if more_tries:
                continue
            failed = "Ray did not start on this machine" if address is None else f"no Ray cluster answers at {address}"
            raise StudyError(f"{failed}: {_reason(error)}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the driver without a word


def _require_answer(address: str) -> None:
    """Knock at a cluster's door, and ask whether Ray is at home: by itself, Ray would try for a quarter of an hour.

    Raises:
        StudyError: nobody opens, or it is somebody else.
    """
    with suppress(ConnectionError):  # `auto`, and no Ray has been started here: Ray says so at once
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        if port.isdigit():
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_SECONDS).close()
            except OSError as error:
                raise StudyError(f"no Ray cluster answers at {found}: {error.strerror or error}") from error
            for more_tries in (1, 0):
                try:
                    GcsClient(address=found)  # which gives up after 40 s
                    break
                except ray.exceptions.RayError as error:
                    if not more_tries:
                        raise StudyError(f"no Ray cluster answers at {found}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def disconnect(in_order: bool = True) -> None:
    """Leave the cluster, or end the private Ray.

    Args:
        in_order: else the lanes are still at work, or coming up; on a cluster they may leave placement groups, which
            this driver joins once more for.
    """
    job = own_job() if ray.is_initialized() and not in_order and "RAY_ADDRESS" in os.environ else None
    ray.shutdown()
    if job is not None:
        with suppress(StudyError):  # the cluster is gone, and the groups with it
            connect()
            sweep(job)
            ray.shutdown()


@dataclass(frozen=True)
class Plan:
    """What the driver must know of a study before it begins."""

    study: StudySpec  # with the resources decided
    data: Datasets
    epochs: dict[str, int]  # of a whole run, by cell name
    lanes: int  # as the cluster is now
    work: int  # lanes that there is work for


def plan(study: StudySpec, data: Datasets, nodes: Sequence[dict[str, float]], train_on: TrainOn = "split") -> Plan:
    """Fit a study to its data and the machines.

    Args:
        study: the study.
        data: its data.
        nodes: the resources of each node.
        train_on: which samples its runs train on.

    Raises:
        StudyError: no node can hold a trial.
    """
    study = study.model_copy(update={"resources": with_gpus(study.resources, nodes)})
    epochs: dict[str, int] = {}
    for part in study.variants():
        dataset = data[source(part.dataset)]
        samples = training_samples(part.dataset, dataset) if train_on == "split" else len(dataset.train_labels)
        epochs |= {cell.name: part.extent(cell, samples).epochs for cell in part.list_cells()}
    work = len(epochs) * study.tuning.trials
    return Plan(study, data, epochs, min(count_lanes(study.resources, nodes), work), work)


def plan_when_there_is_room(
    study: StudySpec, data: Datasets, notice: Callable[[str], None], train_on: TrainOn = "split"
) -> Plan:
    """A study's plan, as soon as the cluster has room for a trial: it may still be coming up.

    Args:
        study: the study.
        data: its data.
        notice: is told what is being waited for.
        train_on: which samples its runs train on.

    Raises:
        StudyError: nothing has come in `resources.wait_minutes`, or this is a machine, which will not grow.
    """
    began, said, bound = time.monotonic(), "", 60 * study.resources.wait_minutes
    while True:
        try:
            return plan(study, data, cluster_nodes(), train_on)
        except StudyError as error:
            reason, left = str(error), bound - (time.monotonic() - began)
            if "RAY_ADDRESS" not in os.environ or left <= 0:
                waited = f"; given up after {bound / 60:g} min (resources.wait_minutes)" if left <= 0 else ""
                raise StudyError(reason + waited) from error
        if reason != said:
            notice(f"waiting for nodes, up to {left / 60:.0f} min (resources.wait_minutes): {reason}")
            said = reason
        time.sleep(min(LOOK_SECONDS, left))


class TrialActor(tune.Trainable):
    """Tune's end of a lane: the actor outlives its trials (`reuse_actors`), and its worker group with it."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the worker group; it comes up while the first trial waits for its first report."""
        self._tuning, self._jobs = Tuning.model_validate(config["lane"]["tuning"]), count()
        self._resources = Resources.model_validate(config["lane"]["resources"])
        self._lane: Lane | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial, in the same lane unless its worker group is gone."""
        if self._lane is None or not self._lane.is_alive():
            setup = new_config["lane"]
            data = dict(zip(setup["sources"], setup["data"], strict=True))
            name = f"lane-{uuid4().hex[:8]}"
            self._lane = Lane(
                self._resources, data, setup["code"][0], setup["storage"], name, avoid=new_config["avoid"]
            )
        self._begun = False
        job = Job(
            key=f"{next(self._jobs)} {new_config['cell']} {new_config['number']}",
            run=new_config["run"],
            rungs=new_config["rungs"],
            resume=new_config["resume"],
            checkpoint_seconds=60 * self._resources.checkpoint_minutes,
            keep=new_config["keep"],
        )
        self._lane.begin(job)
        return True

    def step(self) -> dict[str, Any]:
        """That the present trial has begun, and then its next epoch: its report, what the search makes of it, and how
        the trial ended, if so.

        Raises:
            LaneError: the worker group has died; Tune ends this actor and gives the next trial a new lane.
        """
        assert self._lane is not None
        try:
            if not self._begun:
                nodes = self._lane.come_up()
                self._begun = True
                return {"nodes": nodes}
            report = self._lane.next_report(60 * self._resources.timeout_minutes)
        except LaneWaits as error:
            return _not_to_blame(WAITS, str(error))
        except LaneError as error:
            if gone := self._lane.gone():
                return _not_to_blame(MOVED, f"gone: {', '.join(gone)}; {error}", gone)
            if isinstance(error, LaneBroken):
                return _not_to_blame(BROKEN, str(error))
            raise
        if report.get("outcome") == "failed" and self._resources.workers > 1 and (gone := self._lane.gone()):
            return _not_to_blame(MOVED, f"gone: {', '.join(gone)}; {report['error']}", gone)
        outcome = report.pop("outcome", None)
        result = {"report": report, "done": outcome is not None}
        result |= {name: report.pop(name) for name in (*STATES, *MACHINE) if name in report}
        if outcome is not None:
            result["outcome"] = outcome
        if outcome != "failed":
            result |= {"epoch": report["epoch"], OBJECTIVE: objective(self._tuning, report, outcome)}
            if (elapsed := time_so_far(self._tuning, report)) is not None:
                result[ELAPSED] = elapsed
        return result

    def cleanup(self) -> None:
        """End the worker group."""
        if self._lane is not None:
            self._lane.end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks for one; a trial's state is its workers' business."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


def _not_to_blame(reason: str, error: str, gone: Sequence[str] = ()) -> dict[str, Any]:
    """What ends a trial that had no part in it."""
    return {"outcome": "failed", "report": {"error": error}, "lane": reason, "gone": list(gone), "done": True}


def tune_study(
    folder: StudyFolder,
    plan: Plan,
    show: Callable[[TrialRecord], None],
    notice: Callable[[str], None],
    verbose: bool = False,
    taken_up: Callable[[Sequence[TrialRecord]], None] = lambda records: None,
) -> None:
    """Run what is missing of a study on the connected Ray.

    Args:
        folder: the study's folder; what it holds already is not run again.
        plan: the study, checked.
        show: is told of every change of a trial.
        notice: is told of damaged files and interrupted trials found in the folder.
        verbose: let Tune print.
        taken_up: is told, once and before that, of the trials that the folder holds already.

    Raises:
        OSError: the folder cannot be written any more.
    """
    records = _tune_what_is_missing(folder, plan, show, notice, verbose, taken_up)
    while promote(folder, plan.study, records, notice):
        records = _tune_what_is_missing(folder, plan, show, notice, verbose, lambda records: None)


def _tune_what_is_missing(
    folder: StudyFolder,
    plan: Plan,
    show: Callable[[TrialRecord], None],
    notice: Callable[[str], None],
    verbose: bool,
    taken_up: Callable[[Sequence[TrialRecord]], None],
) -> list[TrialRecord]:
    """One pass of `tune_study`; returns all trials as they are then."""
    study = plan.study
    pruner_past, records = take_up(folder, study, notice)
    taken_up(records)
    pruner = StudyPruner(study, plan.epochs, pruner_past)
    recorder = Recorder(folder, study, plan.epochs, records, show)
    past = recorder.settle_interrupted(pruner_past, pruner)
    with local_file(folder.journal) as journal, journal.open("wb") as out:  # rebuilt from the records
        Path(f"{journal}.lock").unlink(missing_ok=True)  # an older version's driver has left it, or the dashboard
        storage = JournalStorage(DriverJournal(out))
        search = StudySearch(study, storage, past, recorder.begin, recorder.try_again, notice)
        if not search.is_done():
            fit_runs(plan, search, pruner, recorder, notice, verbose)
    return recorder.trials()


def confirm_runs(
    folder: StudyFolder,
    plan: Plan,
    runs: Sequence[TrialRecord],
    show: Callable[[TrialRecord], None],
    notice: Callable[[str], None],
    verbose: bool = False,
    taken_up: Callable[[Sequence[TrialRecord]], None] = lambda records: None,
) -> None:
    """Run what is missing of a study's confirmed runs on the connected Ray.

    Args:
        folder: of the confirmed runs.
        plan: of `confirm.as_study`, checked.
        runs: all that shall lie in the folder in the end.
        show: see `tune_study`.
        notice: see `tune_study`.
        verbose: see `tune_study`.
        taken_up: is told, once and before that, of those runs that the folder holds already.
    """
    _, records = take_up(folder, plan.study, notice)
    status = {(record.cell, record.number): record.status for record in records}
    cells = {cell.name: cell for cell in plan.study.list_cells()}
    planned = {(run.cell, run.number): run for run in runs}
    taken_up([record for record in records if (record.cell, record.number) in planned])
    recorder = Recorder(
        folder, plan.study, plan.epochs, records, show, lambda cell, number, *_: planned[cell.name, number]
    )
    missing = [run for run in runs if status.get((run.cell, run.number)) not in FINISHED]
    waiting = [(cells[run.cell], run.number, run.params, run.published) for run in missing]
    search = TrialQueue(plan.study, waiting, recorder.begin, recorder.try_again)
    if not search.is_done():
        fit_runs(plan, search, StudyPruner(plan.study, plan.epochs, []), recorder, notice, verbose)


def fit_runs(
    plan: Plan, search: TrialQueue, pruner: TrialScheduler, recorder: Recorder, notice: Callable[[str], None],
    verbose: bool,
) -> None:  # fmt: skip
    """Run what the search hands out on the connected Ray, in as many lanes as fit, until it has no more.

    Raises:
        OSError: the recorder cannot write any more.
        StudyError: no lane comes up.
    """
    from lbstudy.methods.user_code import active  # imports torch

    study = plan.study
    supervisor = Supervisor(study.resources, plan.work, search, lambda avoid: cluster_nodes(avoid=avoid), notice)
    recorder.avoid = supervisor.avoided
    with scratch_folder("tune") as scratch:
        lane = {
            "resources": study.resources.model_dump(),
            "tuning": study.tuning.model_dump(by_alias=True),
            "storage": str(scratch),
            "sources": list(plan.data),
            "data": list(map(ray.put, plan.data.values())),  # in a list, or Tune would resolve each into every trial
            "code": [ray.put(active())],
        }
        watched: list[tune.Callback] = [supervisor, recorder]  # the recorder takes out of a result what it has recorded
        try:
            tune.Tuner(
                tune.with_resources(TrialActor, tune.PlacementGroupFactory([{HEAD_NODE: LANE_SHARE}])),
                param_space={"lane": lane},
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # the search says when it has no more
                    search_alg=search,
                    scheduler=pruner,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=study.name,
                    storage_path=str(scratch),
                    callbacks=watched,
                    # it would keep each trial's last result, and the model in it, for as long as the study runs
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=3 if verbose else 0,
                ),
            ).fit()
        except (KeyboardInterrupt, StudyError):
            recorder.write_running()
            raise
        except tune.TuneError as error:
            if isinstance(error.__context__, OSError):  # from the recorder: Tune makes text of what callbacks raise
                raise error.__context__ from None
            raise
        finally:
            recorder.settle()
