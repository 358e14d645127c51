"""The start-up check: whether Ray, its nodes and the storage are fit for a study.

Each check returns a `Finding`. `lbstudy doctor` shows them all; `lbstudy run` makes the cheap ones and stops at a bad
one. Only the driver writes to the storage (checkpoints reach it through Ray), so it alone needs access.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lbstudy import storage
from lbstudy.storage import StoragePath
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources, StudySpec
from lbstudy.training.datasets import Datasets, source
from lbstudy.tuning import tuner
from lbstudy.tuning.groups import Group, Job, in_words, leaked, list_groups, list_jobs, remove
from lbstudy.tuning.nodes import NODE_SECONDS, NodeReport, alive, ask_nodes, misfit, own_versions
from lbstudy.tuning.resources import count_lanes, with_gpus

FULL = 0.05
"""Ray stops writing to a disk with less than this part free."""

TRIAL_BYTES = 20_000  # record and Optuna journal of a trial
EPOCH_BYTES = 400  # a line of its series


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    sentence: str


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
        reports = ask_nodes(imports="RAY_ADDRESS" in os.environ)
        if (other := ray_here()) is not None:
            sentence = f"one of this machine's own was started; --address {other} examines the one that runs here"
            yield Finding("Ray", True, sentence)
        yield check_versions(reports)
        yield check_clocks(reports)
        yield check_leaks(list_groups(), list_jobs())
        if "RAY_ADDRESS" in os.environ:
            yield check_exchange(alive())
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
    """The cheap checks; this machine's own versions need none. What dead drivers hold is given back before."""
    here = ray.get_runtime_context().get_node_id()
    if others := [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]:
        yield check_versions(ask_nodes(others))
    yield check_storage(folder, planned_bytes(plan.study, plan.data, plan.lanes))


def ray_here() -> str | None:
    """The address of a Ray that has been started on this machine, where none was asked for; None if there is none."""
    from ray._private.services import find_gcs_addresses
    from ray._private.utils import read_ray_address

    address = None if "RAY_ADDRESS" in os.environ else read_ray_address()
    return address if address in find_gcs_addresses() else None


def require(findings: Iterable[Finding]) -> None:
    """Stop at what is wrong.

    Raises:
        StudyError: with a line for each bad finding.
    """
    if bad := [finding for finding in findings if not finding.ok]:
        raise StudyError("\n".join(f"{finding.name}: {finding.sentence}" for finding in bad))


def check_versions(reports: Sequence[NodeReport]) -> Finding:
    """Whether all nodes answer and have the driver's versions and code."""
    odd = [f"{report.host}: {report.error}" for report in reports if report.error]
    odd += [f"{report.host} {why}" for report in reports if not report.error and (why := misfit(report))]
    wanted = ", ".join(f"{name} {version}" for name, version in own_versions().items())
    if odd:
        return Finding("versions", False, f"every node needs {wanted} like the driver, but {'; '.join(odd)}")
    return Finding("versions", True, f"{wanted} on {len(reports)} node{'s' * (len(reports) != 1)}")


def check_clocks(reports: Sequence[NodeReport]) -> Finding:
    """Whether the nodes' clocks are the driver's: records of a study name times, and locks in a folder use them."""
    off = [f"that of {report.host} is {report.clock:+.0f} s off" for report in reports if abs(report.clock) > 2]
    return Finding("clocks", not off, "; ".join(off) or "agree")


def check_leaks(groups: Sequence[Group], jobs: Mapping[str, Job]) -> Finding:
    """Whether drivers that are dead hold resources."""
    left = leaked(groups, jobs)
    if not left:
        return Finding("resources of dead jobs", True, "none")
    whose = "; ".join(f"{in_words(group.resources)} of {jobs[group.job].words}" for group in left)
    ours = any(_is_ours(jobs[group.job]) for group in left)
    mend = (
        "the next `lbstudy run` gives back what its own have left"
        if ours
        else "nothing gives them back but ray.util.remove_placement_group, or Ray's restart"
    )
    return Finding("resources of dead jobs", False, f"{whose}; {mend}")


def _is_ours(job: Job) -> bool:
    return "lbstudy" in job.command


def clean_up(notice: Callable[[str], None]) -> None:
    """Give back what dead drivers of lbstudy's hold; name what others' do."""
    jobs = list_jobs()
    left = leaked(list_groups(), jobs)
    if ours := [group for group in left if _is_ours(jobs[group.job])]:
        remove(ours)
        notice("given back: " + "; ".join(f"{in_words(group.resources)} of {jobs[group.job].words}" for group in ours))
    if others := [group for group in left if group not in ours]:
        notice(check_leaks(others, jobs).sentence)


def check_exchange(nodes: Sequence[dict[str, Any]]) -> Finding:
    """Whether workers on two nodes form a process group and sum a tensor."""
    from lbstudy.tuning.process_group import GroupError, Member, prove

    name = "workers on several nodes"
    places = [node for node in nodes if node["Resources"].get("CPU") or node["Resources"].get("GPU")]
    if len(places) < 2:
        return Finding(name, True, "not tried: one node alone can hold workers")
    kind: Any = ray.remote(num_cpus=0)(_Hand)
    hands, members = list[Any](), list[Member]()
    for node in places:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        hands.append(kind.options(scheduling_strategy=place).remote())
        members.append(
            Member(node["NodeManagerHostname"], node["NodeID"], node["NodeManagerAddress"], hands[-1].do.remote)
        )
    try:
        ready = ray.wait([hand.do.remote(int) for hand in hands], num_returns=len(hands), timeout=NODE_SECONDS)[1]
        if ready:
            return Finding(name, False, f"{len(ready)} of {len(hands)} processes have not started")
        prove(members)
    except (GroupError, ray.exceptions.RayError) as error:
        return Finding(name, False, str(error).strip().splitlines()[-1])
    finally:
        for hand in hands:
            ray.kill(hand)
    return Finding(name, True, f"those on {', '.join(m.host for m in members)} form a group and sum a tensor")


class _Hand:
    """A process on a node."""

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function there."""
        return work(*arguments)


def check_devices(report: NodeReport) -> Finding:
    """What a node offers, and whether it really has the GPUs that Ray counts."""
    counted = report.resources.get("GPU", 0)
    offers = f"{report.resources.get('CPU', 0):g} CPU, {counted:g} GPU"
    name = f"node {report.host}"
    if counted and report.gpus is not None and len(report.gpus) < counted:
        return Finding(name, False, f"Ray counts {offers}, but nvidia-smi lists {len(report.gpus)} GPUs")
    if report.disk is not None and report.disk[0] < FULL * report.disk[1]:
        return Finding(name, False, f"{offers}, but {size(report.disk[0])} free where Ray keeps its files")
    kinds = sorted({gpu.split(": ", 1)[-1].split(" (UUID")[0] for gpu in report.gpus or []}) if counted else []
    free = f", {size(report.disk[0])} free" if report.disk is not None else ""
    return Finding(name, True, offers + (f" ({', '.join(kinds)})" if kinds else "") + free)


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
