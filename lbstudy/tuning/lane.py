"""A lane: one worker group that outlives its trials.

Starting a Ray Train worker group takes tens of seconds (processes, imports, process group, data on the device), so
a lane starts one `TorchTrainer` and feeds it trial after trial. The workers run `_serve`: take the next job, train
it, post a report per epoch. Nothing of a trial survives in the workers but the data on the device; a trial in a
warm lane equals the same trial in a fresh process. The data set comes from the object store: the driver has read it,
so no worker needs its files. A user's own code comes the same way.

Lane and workers talk through a mailbox actor. A trial can be ended from outside only at a rung of the pruner, so
the workers wait for a verdict there and nowhere else. A worker group that does not come up waits for its resources
(`LaneWaits`) or is broken (`LaneBroken`); neither is a trial's fault. Nor is a node that goes. With `process_group` and
`trainer`, this is the only file that imports ray.train.
"""

from __future__ import annotations

import asyncio
import gc
import io
import math
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lbstudy.parallel import network
from lbstudy.study.run import DatasetSpec, RunSpec, TrainOn
from lbstudy.study.spec import Resources
from lbstudy.tuning.groups import list_groups, own_job

if TYPE_CHECKING:
    import torch

    from lbstudy.training.data import ImageData
    from lbstudy.training.train import EpochReport

POLL_SECONDS = 1.0
END_SECONDS = 30.0
START_SECONDS = 300.0
WAIT_SECONDS = 60.0
"""For resources: then another lane, which has some and no trial, may take the trial. This one stays and waits."""

GONE_SECONDS = 5.0
"""What a node's end may come later than the end of the workers on it."""

ANSWER_SECONDS = 120.0
"""For the mailbox, a process beside the lane's that has nothing else to do."""

DRAIN_SECONDS = 5.0
"""How often a lane asks whether a node of its is about to go."""

NODE_LABEL = "ray.io/node-id"
CAUSE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b: ")


class LaneError(RuntimeError):
    """The worker group of a lane ended, or fell silent, although nobody asked it to."""


class LaneWaits(LaneError):
    """The worker group has not come up yet, for want of resources."""


class LaneBroken(LaneError):
    """The worker group cannot come up: a node lacks a package, or nodes do not reach each other."""


@dataclass(frozen=True)
class Job:
    """A trial for the workers."""

    key: str  # unique within the lane
    run: dict[str, Any]  # RunSpec as plain data
    rungs: list[int]  # epochs after which the workers wait for a verdict, of the pruner or on a target
    resume: Sequence[ray.ObjectRef] = ()  # a checkpoint to go on from, if any
    checkpoint_seconds: float = math.inf  # how often a report brings a checkpoint
    keep: Sequence[int] = ()  # epochs whose reports bring the model


@dataclass(frozen=True)
class Start:
    """How far a worker group has come."""

    nodes: tuple[tuple[str, str], ...] = ()  # of its workers: Ray's id and host name; none until they are there
    controller: Any = None  # Ray Train's actor that owns the workers; only until they are up, or it would outlive them
    up: bool = False  # whether it has asked for its first job
    error: str = ""  # why it will not come up


@ray.remote(num_cpus=0)
class Mailbox:
    """Jobs one way, reports the other. Every worker reads the same sequence of jobs, so none has to tell the rest."""

    def __init__(self) -> None:
        self._jobs: list[Job | None] = []  # None: the lane ends
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._taken: dict[str, int] = {}  # reports that the lane has asked for, by job
        self._start = Start()
        self._hurry = False
        self._changed = asyncio.Condition()

    async def place(self, nodes: list[tuple[str, str]], controller: Any) -> None:
        """The workers of this controller are on these nodes (Ray's id, host name) and begin to come together."""
        async with self._changed:
            self._start = replace(self._start, nodes=tuple(nodes), controller=controller)
            self._changed.notify_all()

    async def give_up(self, error: str) -> None:
        """The workers do not come together."""
        async with self._changed:
            self._start = replace(self._start, error=error)
            self._changed.notify_all()

    async def start(self, timeout: float) -> Start:
        """How far the worker group has come, as soon as it is up or has failed, or the time is over."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._start.up or bool(self._start.error)), timeout
                )
            return self._start

    async def hurry(self) -> None:
        """A node is about to go: the next report shall bring a checkpoint."""
        self._hurry = True

    async def put_job(self, job: Job | None) -> None:
        """Begin a job, which abandons the one before it; None ends the lane."""
        async with self._changed:
            self._jobs.append(job)
            self._reports = {job.key: []} if job else {}
            self._taken = {job.key: 0} if job else {}
            self._changed.notify_all()

    async def job(self, number: int) -> Job | None:
        """Wait for the job of this number; jobs that were abandoned before they began are still handed out."""
        async with self._changed:
            self._start = replace(self._start, up=True, controller=None)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: len(self._jobs) > number)
            return self._jobs[number]

    async def post(self, key: str, report: dict[str, Any]) -> bool:
        """A report of a job; dropped where the job has been abandoned. Returns whether the next one shall bring a
        checkpoint."""
        async with self._changed:
            if key in self._reports:
                self._reports[key].append(report)
                self._changed.notify_all()
        return self._hurry

    async def report(self, key: str, number: int, timeout: float) -> dict[str, Any] | None:
        """The job's report of this number (from 0), or None if none came in time. Asking for it says: go on."""
        async with self._changed:
            if key in self._taken:
                self._taken[key] = number
                self._changed.notify_all()
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: len(self._reports.get(key, [])) > number), timeout
                )
            except TimeoutError:
                return None
            return self._reports[key][number]

    async def goes_on(self, key: str, reports: int) -> bool:
        """Wait for the verdict on a job that has posted so many reports: True once the next one is asked for."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._taken.get(key, reports) >= reports)
            return key in self._taken


class Lane:
    """A worker group and the trial it is training.

    Args:
        resources: workers of the group, and what each occupies; `gpus_per_worker` decided.
        data: the `Dataset` of each source of its trials (`datasets.source`), in the object store.
        code: the user's `Code` that they need, likewise.
        storage: folder for Ray Train's own bookkeeping; as no Ray checkpoint is reported, only the node of the lane
            itself uses it.
        name: of the group in Ray's logs.
        avoid: nodes that cannot hold workers, by Ray's ids.
    """

    def __init__(
        self, resources: Resources, data: Mapping[str, ray.ObjectRef], code: ray.ObjectRef, storage: str, name: str,
        avoid: Sequence[str] = (),
    ):  # fmt: skip
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

        from lbstudy.tuning.process_group import GroupConfig
        from lbstudy.tuning.trainer import LaneTrainer  # imports torch: seconds that the driver need not spend

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._error: BaseException | None = None
        self._job: Job | None = None
        self._reports = 0
        self._up = self._lost = False
        self._began = self._asked = time.monotonic()
        self._nodes: dict[str, str] = {}  # of its workers: host names by Ray's ids
        self._workers = resources.workers
        gpus = float(resources.gpus_per_worker)
        per_worker = {"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        trainer = LaneTrainer(
            _serve,
            train_loop_config={
                "mailbox": self._mailbox,
                "sources": list(data),
                "data": list(data.values()),
                "code": [code],
                "gpus": gpus,
            },
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=gpus > 0,
                resources_per_worker=per_worker,
                label_selector={NODE_LABEL: f"!in({','.join(avoid)})"} if avoid else None,  # type: ignore[call-arg]
            ),
            torch_config=GroupConfig(process_group_backend(resources), self._mailbox),  # type: ignore[arg-type]
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
                # a group that Ray Train started again by itself would begin with the lane's first job
                failure_config=FailureConfig(controller_failure_limit=0, max_preemption_failures=0),  # type: ignore[call-arg]
            ),
        )
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name=name, daemon=True)
        self._thread.start()

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # kept for the trial that waits for a report
            self._error = error

    def is_alive(self) -> bool:
        """Whether the worker group is there, or still on its way."""
        return self._thread.is_alive() and not self._lost

    def begin(self, job: Job) -> None:
        """Train this job; a job still in training is abandoned at its rung."""
        self._job, self._reports = job, 0
        ray.get(self._mailbox.put_job.remote(job))

    def come_up(self) -> list[str]:
        """Wait for the worker group; returns the names of its nodes.

        Raises:
            LaneWaits: its resources have not been there for WAIT_SECONDS.
            LaneBroken: it cannot come up.
            LaneError: the lane's mailbox has died, or does not answer.
        """
        began = time.monotonic()
        while not self._up:
            start: Start = self._call(self._mailbox.start.remote(POLL_SECONDS))
            if start.nodes and not self._nodes:
                self._nodes, began = dict(start.nodes), time.monotonic()
            if start.error or not self._thread.is_alive():
                self._lost = True
                raise LaneBroken(start.error or first_cause(self._error)) from self._error
            self._up = start.up
            if not self._up:
                self._require_patience(time.monotonic() - began, start.controller)
        return sorted(set(self._nodes.values()))

    def _require_patience(self, waited: float, controller: Any) -> None:
        """Say what a worker group has been waiting for too long, if so."""
        if not self._nodes and waited > WAIT_SECONDS:
            own = [group for group in list_groups() if group.job == own_job() and group.is_for()]
            if any(group.waits for group in own):
                raise LaneWaits(f"its resources have not been there for {WAIT_SECONDS:.0f} s")
        if waited > START_SECONDS:
            self._lost = True
            if controller is not None:  # or its workers would hold what the next group needs
                ray.kill(controller)
            where = f" on {', '.join(sorted(set(self._nodes.values())))}" if self._nodes else ""
            raise LaneBroken(f"the workers{where} have not come up within {START_SECONDS:.0f} s")

    def _call(self, answer: ray.ObjectRef) -> Any:
        try:
            return ray.get(answer, timeout=ANSWER_SECONDS)
        except ray.exceptions.RayActorError as error:
            raise LaneError(f"the lane's mailbox has died: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            self._lost = True
            raise LaneError(f"the lane's mailbox has not answered for {ANSWER_SECONDS:.0f} s") from error

    def next_report(self, timeout: float = math.inf) -> dict[str, Any]:
        """The next epoch's report of the present job, of a worker group that is up. The last one has an `outcome`.

        Args:
            timeout: seconds to wait for it.

        Raises:
            LaneError: the worker group has died, or has not reported in time.
        """
        assert self._job is not None
        began = time.monotonic()
        while True:
            report = self._call(self._mailbox.report.remote(self._job.key, self._reports, POLL_SECONDS))
            if report is not None:
                self._reports += 1
                if report.get("outcome") == "failed" and self._workers > 1:
                    self._lost = True  # its end is near, see `_serve`: the next trial gets another group
                return report
            waited = time.monotonic() - began
            if not self._thread.is_alive():
                raise LaneError(f"the lane's worker group has ended: {first_cause(self._error)}") from self._error
            if waited > timeout:
                self._lost = True
                raise LaneError(f"no report for {waited:.0f} s; resources.timeout_minutes allows {timeout / 60:g} min")
            self._save_before_a_node_goes()

    def _save_before_a_node_goes(self) -> None:
        """Ask for a checkpoint once a node of the workers has been given notice."""
        if time.monotonic() - self._asked > DRAIN_SECONDS:
            self._asked = time.monotonic()
            if draining() & set(self._nodes):
                self._call(self._mailbox.hurry.remote())

    def gone(self) -> list[str]:
        """The names of the nodes of its workers that have gone or are about to, after something has gone wrong. Ray may
        need a minute to notice; a node whose Ray does not open is gone before."""
        deadline = time.monotonic() + (GONE_SECONDS if self._nodes else 0.0)
        while True:
            there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] in self._nodes}
            doors = {id_: (node["NodeManagerAddress"], node["NodeManagerPort"]) for id_, node in there.items()}
            silent = network.unreachable(doors, GONE_SECONDS)
            if found := set(self._nodes) - there.keys() | draining() & set(self._nodes) | silent.keys():
                self._lost = True
                return sorted(self._nodes[node] for node in found)
            if time.monotonic() > deadline:
                return []
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Let the workers go and wait until they have; a group that does not answer dies with this process."""
        if not (self._up and self.is_alive()):
            return
        self._call(self._mailbox.put_job.remote(None))
        self._thread.join(END_SECONDS)


def draining() -> set[str]:
    """The nodes that have been given notice, by Ray's ids: by a cloud's watcher of spot machines, or by a person."""
    return set(ray._private.state.state.get_draining_nodes())  # Ray has no public way to ask


def first_cause(error: BaseException | None) -> str:
    """What is at the bottom of an error of Ray's, with the lines that say where."""
    if error is None:
        return "without an error"
    text = str(error).strip() or type(error).__name__
    known = [line.strip() for line in text.splitlines() if CAUSE.match(line.strip())]
    return f"{known[-1]}\n{text}" if known else text


def process_group_backend(resources: Resources) -> str | None:
    """gloo where several workers of a trial may share a GPU, which NCCL refuses; else Ray's choice."""
    shared = resources.workers > 1 and 0 < float(resources.gpus_per_worker) <= 0.5
    return "gloo" if shared else None


def _serve(config: dict[str, Any]) -> None:
    """The workers' side of a lane: jobs until there are no more."""
    import ray.train.torch
    import torch

    from lbstudy.methods import user_code
    from lbstudy.training import data, datasets, graphs

    user_code.activate(ray.get(config["code"][0]))
    mailbox, device = config["mailbox"], ray.train.torch.get_device()
    gpu_share = min(config["gpus"], 1.0)
    found = dict(zip(config["sources"], config["data"], strict=True))

    @lru_cache(maxsize=1)  # trials of one study share their data, or most do: a device holds one set of images
    def placed(spec: DatasetSpec, split_seed: int, train_on: TrainOn) -> Any:
        dataset: Any = ray.get(datasets.of_run(found, spec))
        return data.place(dataset, spec, split_seed, device, train_on, gpu_share)

    if ray.train.get_context().get_world_size() > 1:
        torch.distributed.all_reduce(torch.ones(1, device=device))  # NCCL connects only now
    number = 0
    while (job := ray.get(mailbox.job.remote(number))) is not None:
        number += 1
        try:
            run = RunSpec.model_validate(job.run)
            images = run.dataset.model_copy(update={"augment": (), "drop_last": False})  # which do not change them
            _train(job, run, placed(images, run.split_seed, run.train_on), mailbox)
        except Exception as error:
            trace = traceback.format_exc()
            if isinstance(error, torch.OutOfMemoryError):
                trace += f"out of memory with batch_size {job.run.get('batch_size')}: set resources.micro_batch_size\n"
            ray.get(mailbox.post.remote(job.key, {"outcome": "failed", "error": trace}))
            if ray.train.get_context().get_world_size() > 1:
                raise  # the others may be waiting in a collective operation: only a new group is sound
        graphs.release(device)
        gc.freeze()  # imports have left so many objects that collecting them would take longer than a short trial


def _train(job: Job, run: RunSpec, data: ImageData, mailbox: Any) -> None:
    """Train one job and post its reports; the last one says how it ended, unless the pruner ended it."""
    import torch
    from ray.train import get_context

    from lbstudy.training.train import Snapshot, train

    rank, workers, device = get_context().get_world_rank(), get_context().get_world_size(), data.device
    epochs = run.extent(len(data.train)).epochs
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {"device": f"{workers} x {kind}", "workers": workers}
    posted, saved, hurry = 0, time.monotonic(), False

    def post(report: dict[str, Any]) -> None:
        nonlocal posted, hurry
        posted += 1
        if rank == 0:
            hurry = ray.get(mailbox.post.remote(job.key, report | machine | peak_memory(device)))

    def on_epoch(report: EpochReport, snapshot: Callable[[], Snapshot]) -> bool:
        nonlocal saved
        if report.is_last(run, epochs):
            return True  # posted below, together with the outcome
        message = _plain(report)
        if rank == 0 and (hurry or time.monotonic() - saved >= job.checkpoint_seconds):
            message["checkpoint"], saved = [ray.put(_to_bytes(snapshot()))], time.monotonic()
        if rank == 0 and report.epoch in job.keep:
            message["kept"] = [ray.put(_to_bytes(snapshot()["evaluated"]))]
        post(message)
        return report.epoch in job.rungs and not ray.get(mailbox.goes_on.remote(job.key, posted))

    resume = None
    if job.resume:
        resume = torch.load(io.BytesIO(ray.get(job.resume[0])), map_location=device, weights_only=True)
    outcome = train(run, data, on_epoch=on_epoch, resume=resume)
    if outcome.last.is_last(run, epochs):
        ended = {"outcome": "diverged" if outcome.diverged else "completed", "fingerprint": outcome.fingerprint}
        states = {"model": outcome.model.state_dict()} | ({"best": outcome.best["model"]} if outcome.best else {})
        found = {name: [ray.put(_to_bytes(state))] for name, state in states.items() if rank == 0}
        post(_plain(outcome.last) | ended | found)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most that this process has had resident so far, and that the present job has taken of its GPU, in bytes."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    taken = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {"memory": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "device_memory": taken}


def _plain(report: EpochReport) -> dict[str, Any]:
    """A report as it travels, without what the run did not evaluate."""
    return {name: value for name, value in asdict(report).items() if value is not None}


def _to_bytes(state: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
