"""Placement groups: with them Ray sets resources aside for a worker group. Who has some, who waits for some, and which
were left by a driver that is dead.

Ray removes a driver's groups when it ends, but not those that its dying lanes ask for a moment later; and those of a
lane that ends before it has come up stay as long as the driver. They hold their resources, and Ray does not tell.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray._private import state  # what is public tells no creators, or asks over HTTP, which a driver would do often
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group

SETTLE_SECONDS = 2.0
SWEEP_SECONDS = 10.0


class Group(NamedTuple):
    """A placement group that is there or waits for its resources."""

    id: str
    job: str
    waits: bool
    resources: Mapping[str, float]
    orphan: bool = False  # whether the actor that asked for it is dead
    detached: bool = False  # meant to outlive its driver

    def is_for(self, kinds: Sequence[str] = ("CPU", "GPU")) -> bool:
        """Whether it sets any of these kinds of resources aside, as a worker group's does."""
        return any(self.resources.get(kind, 0) for kind in kinds)


class Job(NamedTuple):
    """A driver that the cluster knows."""

    dead: bool
    words: str  # what it is, where
    command: str


def own_job() -> str:
    """The job of this driver, or of the driver that this actor belongs to."""
    return str(ray.get_runtime_context().get_job_id())


def list_groups() -> list[Group]:
    """All placement groups that have not been removed."""
    found = []
    for content in state.state._connect_and_get_accessor().get_placement_group_table():
        entry = PlacementGroupTableData.FromString(content)
        if entry.state != PlacementGroupTableData.REMOVED:
            total: Counter[str] = Counter()
            for bundle in entry.bundles:
                total.update(bundle.unit_resources)
            waits = entry.state != PlacementGroupTableData.CREATED
            names = (entry.placement_group_id.hex(), entry.creator_job_id.hex())
            by_driver = ray.ActorID(entry.creator_actor_id).is_nil()  # then Ray calls the actor dead, too
            orphan = entry.creator_actor_dead and not by_driver
            found.append(Group(*names, waits, dict(total), orphan, entry.is_detached))
    return found


def list_jobs() -> dict[str, Job]:
    """The drivers that the cluster has known, by the id of their job."""
    found = {}
    for entry in state.jobs():
        command = " ".join(entry["Entrypoint"].split()) or "a driver without a command"
        words = (
            f"job {entry['JobID']} ({in_short(command)}, process {entry['DriverPid']} on {entry['DriverIPAddress']})"
        )
        found[entry["JobID"]] = Job(entry["IsDead"], words, command)
    return found


def in_short(command: str) -> str:
    """A command without the paths of the interpreter and of the program, which say the least and stand first."""
    return re.sub(r"^(\S*/)?(python\S* (-m )?(\S*/)?)?", "", command)[:120]


def leaked(groups: Sequence[Group], jobs: Mapping[str, Job]) -> list[Group]:
    """The groups whose driver is dead, and which nobody can use any more."""
    return [group for group in groups if group.job in jobs and jobs[group.job].dead and not group.detached]


def in_words(resources: Mapping[str, float]) -> str:
    """Resources, without Ray's own bookkeeping: `2 CPU and 1 GPU`."""
    kinds = {kind: amount for kind, amount in resources.items() if amount and not kind.startswith(("node:", "bundle"))}
    return " and ".join(f"{amount:g} {kind}" for kind, amount in kinds.items()) or "nothing"


def holders(kinds: Sequence[str], groups: Sequence[Group], jobs: Mapping[str, Job], own: str) -> list[str]:
    """Who but this driver holds resources of these kinds in placement groups, in words."""
    held: dict[str, Counter[str]] = {}
    for group in groups:
        if group.job != own and not group.waits and group.is_for(kinds):
            held.setdefault(group.job, Counter()).update({k: v for k, v in group.resources.items() if k in kinds})
    found = []
    for job, resources in held.items():
        known = jobs.get(job, Job(False, f"job {job}", ""))
        left = "left by the dead " if known.dead else "held by "
        found.append(f"{in_words(resources)} {left}{known.words}")
    return found


def remove(groups: Sequence[Group]) -> None:
    """Give the resources of groups back."""
    for group in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.id))))


def sweep(job: str) -> int:
    """Remove what a driver that has just ended has left, until for a while nothing new comes; returns how many."""
    deadline, removed = time.monotonic() + SWEEP_SECONDS, 0
    quiet = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < min(quiet, deadline):
        if found := [group for group in list_groups() if group.job == job]:
            remove(found)
            removed += len(found)
            quiet = time.monotonic() + SETTLE_SECONDS
        time.sleep(0.2)
    return removed
