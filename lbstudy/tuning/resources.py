"""What a trial occupies, and how many fit: on this machine, before Ray is started, or on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from lbstudy.parallel.machine import usable_cpus
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources


def this_machine() -> dict[str, float]:
    """CPUs and GPUs as a private Ray will count them here; nothing is started."""
    import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

    from ray._private.resource_and_label_spec import ResourceAndLabelSpec  # the only place where Ray counts

    counted = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
    return {"CPU": float(min(counted.num_cpus or 0, usable_cpus())), "GPU": float(counted.num_gpus or 0)}


def count_lanes(resources: Resources, nodes: Sequence[dict[str, float]]) -> int:
    """How many trials can run at the same time.

    Args:
        resources: what a trial occupies, and how many there may be at most.
        nodes: the resources of each node, those an autoscaler may still add included.

    Raises:
        StudyError: not even one trial fits; says what is missing.
    """
    need = {"CPU": resources.cpus_per_worker, "GPU": float(resources.gpus_per_worker)}
    need = {kind: amount for kind, amount in need.items() if amount}
    fits = [min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in need.items()) for node in nodes]
    if sum(fits) >= resources.workers:
        return min(sum(fits) // resources.workers, resources.lanes or sum(fits))
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
