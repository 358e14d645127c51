"""What the nodes of a cluster are like, asked of themselves by a small task on each."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lbstudy.tuning.rayenv  # isort: skip  # before ray

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import lbstudy
from lbstudy import __version__

NODE_SECONDS = 60.0
NEEDED = ("torch", "ray.train.torch", "lbstudy.tuning.lane", "lbstudy.training.train")
"""What a worker imports."""


@dataclass(frozen=True)
class NodeReport:
    """What a task on a node has seen there, or why none ran."""

    host: str
    resources: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] | None = None  # None: nothing there can list them
    error: str = ""
    clock: float = 0.0  # seconds that its clock is off the driver's, at least
    disk: tuple[int, int] | None = None  # bytes free, and in all, where Ray keeps its files
    id: str = ""


class _Seen(NamedTuple):
    versions: dict[str, str]
    gpus: list[str] | None
    time: float
    disk: tuple[int, int] | None


class Question(NamedTuple):
    """A node that has been asked."""

    node: dict[str, Any]
    answer: ray.ObjectRef
    asked: float  # by the driver's clock
    since: float  # by the monotonic one


def name(node: dict[str, Any]) -> str:
    """A node of `ray.nodes()`, in words."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def alive() -> list[dict[str, Any]]:
    """The nodes of the cluster."""
    return [node for node in ray.nodes() if node["Alive"]]


def ask(node: dict[str, Any], imports: bool = False) -> Question:
    """Begin to look around on a node.

    Args:
        node: of `ray.nodes()`.
        imports: import there what a worker imports, which takes seconds.
    """
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_look_around).options(scheduling_strategy=place)
    return Question(node, task.remote(imports), time.time(), time.monotonic())


def read(question: Question) -> NodeReport | None:
    """What a node has answered; None while it has not."""
    node, answer, asked, since = question
    report = NodeReport(name(node), node["Resources"], id=node["NodeID"])
    if not ray.wait([answer], timeout=0)[0]:
        late = time.monotonic() - since > NODE_SECONDS
        return NodeReport(report.host, report.resources, error=SILENT, id=report.id) if late else None
    try:
        seen = ray.get(answer)
    except Exception as error:  # whatever keeps a task from running there, a missing package for example
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return NodeReport(report.host, report.resources, error=reason, id=report.id)
    now = time.time()
    clock = min(0.0, seen.time - asked) + max(0.0, seen.time - now)
    return NodeReport(
        report.host, report.resources, seen.versions, seen.gpus, clock=clock, disk=seen.disk, id=report.id
    )  # fmt: skip


SILENT = f"no answer within {NODE_SECONDS:.0f} s"


def ask_nodes(nodes: Sequence[dict[str, Any]] | None = None, imports: bool = False) -> list[NodeReport]:
    """Ask nodes, all at once; default: all of the cluster. One that dies meanwhile is left out."""
    questions = [ask(node, imports) for node in (alive() if nodes is None else nodes)]
    deadline = time.monotonic() + NODE_SECONDS
    waiting = [question.answer for question in questions]
    while waiting and time.monotonic() < deadline:
        waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)[1]
    there = {node["NodeID"] for node in alive()}
    reports = []
    for question in questions:
        if question.node["NodeID"] in there:
            silent = NodeReport(name(question.node), question.node["Resources"], error=SILENT)
            reports.append(read(question) or silent)
    return reports


@cache
def own_versions() -> dict[str, str]:
    """Versions that must be equal on all nodes, and a digest of lbstudy's code."""
    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "torch": version("torch"),
        "lbstudy": __version__,
        "lbstudy's code": code_digest(),
    }


def misfit(report: NodeReport) -> str:
    """Why a node cannot hold workers of this driver's, or nothing."""
    if report.error:
        return report.error
    mine = own_versions()
    differing = [f"{what} {has}" for what, has in report.versions.items() if has != mine[what]]
    return f"has {', '.join(differing)}" if differing else ""


def code_digest(package: Path = Path(lbstudy.__file__).parent) -> str:
    """Equal where the modules of a package are."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _look_around(imports: bool) -> _Seen:
    if imports:
        for module in NEEDED:
            import_module(module)
    try:
        disk = shutil.disk_usage(os.environ.get("RAY_TMPDIR", "/tmp"))
        room = (disk.free, disk.total)
    except OSError:
        room = None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
        gpus = [line for line in listed.splitlines() if line.startswith("GPU ")]
    except (OSError, subprocess.SubprocessError):
        gpus = None
    return _Seen(own_versions(), gpus, time.time(), room)
