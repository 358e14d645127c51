"""The start-up check: whether Ray, its nodes and the storage are fit for a study.

Each check returns a `Finding`. `lbstudy doctor` shows them all; `lbstudy run` makes the cheap ones and stops at a bad
one. Only the driver writes to the storage (checkpoints reach it through Ray), so it alone needs access.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lbstudy import __version__, storage
from lbstudy.storage import StoragePath
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources, StudySpec
from lbstudy.training.datasets import Datasets, source
from lbstudy.tuning import tuner
from lbstudy.tuning.resources import count_lanes, with_gpus

NODE_SECONDS = 60.0
STATE_API_SECONDS = 10
TRIAL_BYTES = 20_000  # record and Optuna journal of a trial
EPOCH_BYTES = 400  # a line of its series


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    sentence: str


@dataclass(frozen=True)
class NodeReport:
    """What a task on a node has seen there, or why none ran."""

    host: str
    resources: dict[str, float]
    versions: dict[str, str]
    gpus: list[str] | None = None  # None: nothing there can list them
    error: str = ""


def examine(study: StudySpec | None, data: Datasets | None, folder: StoragePath) -> Iterator[Finding]:
    """All checks, on a Ray that is joined, or started, for them.

    Args:
        study: checked against the cluster, where given.
        data: the study's.
        folder: where studies are written.
    """
    try:
        tuner.connect()
    except StudyError as error:
        yield Finding("Ray", False, str(error))
        return
    try:
        reports = ask_nodes()
        yield check_versions(reports)
        yield check_state_api()
        yield from (check_devices(report) for report in reports if not report.error)
        lanes, nodes = 1, tuner.cluster_nodes()
        if study is not None:
            fit = check_resources(with_gpus(study.resources, nodes), nodes)
            yield fit
            if fit.ok and data is not None:
                lanes = tuner.plan(study, data, nodes).lanes
        needed = planned_bytes(study, data, lanes) if study is not None and data is not None else 0
        yield check_storage(folder, needed)
    finally:
        tuner.disconnect()


def before_a_run(plan: tuner.Plan, folder: StoragePath) -> Iterator[Finding]:
    """The cheap checks; this machine's own versions need none."""
    yield check_state_api()
    here = ray.get_runtime_context().get_node_id()
    if others := [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]:
        yield check_versions(ask_nodes(others))
    yield check_storage(folder, planned_bytes(plan.study, plan.data, plan.lanes))


def require(findings: Iterable[Finding]) -> None:
    """Stop at what is wrong.

    Raises:
        StudyError: with a line for each bad finding.
    """
    if bad := [finding for finding in findings if not finding.ok]:
        raise StudyError("\n".join(f"{finding.name}: {finding.sentence}" for finding in bad))


def ask_nodes(nodes: Sequence[dict[str, Any]] | None = None) -> list[NodeReport]:
    """Run a small task on each node of the cluster, all at once; a node that dies meanwhile is left out."""
    chosen = [node for node in ray.nodes() if node["Alive"]] if nodes is None else nodes
    task = ray.remote(num_cpus=0, max_retries=0)(_look_around)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in chosen
    ]
    ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)
    reports = []
    gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    for node, answer in zip(chosen, asked, strict=True):
        if node["NodeID"] in gone:
            continue
        host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        try:
            versions, gpus = ray.get(answer, timeout=0.1)
            reports.append(NodeReport(host, node["Resources"], versions, gpus))
        except ray.exceptions.GetTimeoutError:
            reports.append(NodeReport(host, node["Resources"], {}, error=f"no answer within {NODE_SECONDS:.0f} s"))
        except Exception as error:  # whatever keeps a task from running there, a missing package for example
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reports.append(NodeReport(host, node["Resources"], {}, error=reason))
    return reports


def own_versions() -> dict[str, str]:
    """Versions that must be equal on all nodes."""
    return {"Python": platform.python_version(), "Ray": ray.__version__, "lbstudy": __version__}


def _look_around() -> tuple[dict[str, str], list[str] | None]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return own_versions(), None
    return own_versions(), [line for line in listed.splitlines() if line.startswith("GPU ")]


def check_versions(reports: Sequence[NodeReport]) -> Finding:
    """Whether all nodes answer and have the driver's versions."""
    mine = own_versions()
    odd = [f"{report.host}: {report.error}" for report in reports if report.error]
    for report in reports:
        differing = [f"{name} {version}" for name, version in report.versions.items() if version != mine[name]]
        if differing:
            odd.append(f"{report.host} has {', '.join(differing)}")
    wanted = ", ".join(f"{name} {version}" for name, version in mine.items())
    if odd:
        return Finding("versions", False, f"every node needs {wanted} like the driver, but {'; '.join(odd)}")
    return Finding("versions", True, f"{wanted} on {len(reports)} node{'s' * (len(reports) != 1)}")


def check_state_api() -> Finding:
    """Whether Ray's State API answers: Ray Train needs it to clean up after trials that were stopped."""
    from ray.util.state import list_actors

    try:
        here = ray.get_runtime_context().gcs_address  # several Rays may run on this machine
        _without_proxy(ray.nodes())
        list_actors(address=here, limit=1, timeout=STATE_API_SECONDS)
    except Exception as error:  # it raises its own kinds, those of its HTTP client, and plain RuntimeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = "start the head node with --include-dashboard=true, and install ray[default] there"
        return Finding("State API", False, f"does not answer: {reason}; {advice}")
    return Finding("State API", True, "answers")


def _without_proxy(nodes: Sequence[dict[str, Any]]) -> None:
    """Keep HTTP among the nodes of the cluster from a proxy, which does not know them."""
    if any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        hosts = {"localhost", "127.0.0.1", *(node["NodeManagerAddress"] for node in nodes)}
        for name in ("no_proxy", "NO_PROXY"):
            given = [host for host in os.environ.get(name, "").split(",") if host]
            os.environ[name] = ",".join([*given, *sorted(hosts - set(given))])


def check_devices(report: NodeReport) -> Finding:
    """What a node offers, and whether it really has the GPUs that Ray counts."""
    counted = report.resources.get("GPU", 0)
    offers = f"{report.resources.get('CPU', 0):g} CPU, {counted:g} GPU"
    name = f"node {report.host}"
    if counted and report.gpus is not None and len(report.gpus) < counted:
        return Finding(name, False, f"Ray counts {offers}, but nvidia-smi lists {len(report.gpus)} GPUs")
    kinds = sorted({gpu.split(": ", 1)[-1].split(" (UUID")[0] for gpu in report.gpus or []}) if counted else []
    return Finding(name, True, offers + (f" ({', '.join(kinds)})" if kinds else ""))


def check_resources(resources: Resources, nodes: Sequence[dict[str, float]]) -> Finding:
    """Whether a trial fits into the cluster."""
    try:
        lanes = count_lanes(resources, nodes)
    except StudyError as error:
        return Finding("resources", False, str(error).removeprefix("resources: "))
    return Finding("resources", True, f"room for {lanes} trial{'s' * (lanes != 1)} at a time")


def check_storage(folder: StoragePath, needed: int) -> Finding:
    """Whether the driver can write there, and has room for what is planned. Leaves nothing behind."""
    folder = storage.real_path(folder)
    try:
        storage.require_writable(folder)
        free = storage.free_bytes(folder)
    except OSError as error:
        return Finding("storage", False, f"{folder} cannot be written: {error.strerror or error}")
    if free is None:
        return Finding("storage", True, f"{folder} can be written")
    if free < needed:
        return Finding("storage", False, f"{folder} has {size(free)} free, but the study may need {size(needed)}")
    plan = f"; the study needs at most {size(needed)}" if needed else ""
    return Finding("storage", True, f"{folder} can be written, {size(free)} free{plan}")


def size(count: float) -> str:
    """So many bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def planned_bytes(study: StudySpec, data: Datasets, lanes: int) -> int:
    """What a study may write: records, checkpoints of running trials (two at a replacement), models of the best."""
    from lbstudy.methods import models, optimizers, sizes, smoothing  # only here: importing torch takes seconds

    records, checkpoint, kept = 0, 0, 0
    for part in study.variants():
        dataset, cells = data[source(part.dataset)], part.list_cells()
        model = models.check(part.model.name, dataset.train_images.shape[1:], dataset.classes, part.model.settings)
        element = 8 if part.precision == "fp64" else 4
        samples = len(dataset.train_labels)
        epochs = max(part.extent(cell, samples).epochs for cell in cells)
        records += len(cells) * study.tuning.trials * (TRIAL_BYTES + EPOCH_BYTES * epochs)
        for optimizer, averaged in {(cell.optimizer, smoothing.averages(cell.smoothing)) for cell in cells}:
            remembered = optimizers.get(optimizer).remembers(model)
            checkpoint = max(checkpoint, sizes.checkpoint_bytes(model, remembered, element, averaged))
        kept += len(cells) * (study.resources.keep_best + 1) * sizes.model_bytes(model, element)
    return records + 2 * lanes * checkpoint + kept
