"""The process group of a worker group: over an interface that all nodes reach, proved before the training needs it.

Ray Train forms the group and waits for half an hour for workers that cannot find each other. Before it does, the
workers here choose the interface with their node's address in the cluster, knock at each other's doors, and sum a
tensor; the first thing that fails is what is told. `lbstudy doctor` proves a cluster the same way.

Ray Train's controller, a process for each lane, loads this module: so it imports no torch, which would be some 270 MB
and seconds of the lane's start. What needs torch is called in the workers, and is what Ray's own `TorchConfig` calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray.train.backend import Backend, BackendConfig

from lbstudy.parallel import network

KNOCK_SECONDS = 5.0
FORM_SECONDS = 40.0
PROOF_SECONDS = 60.0
"""For all of it: what the workers wait for, and 15 seconds more, for they may be slow to answer."""
OPERATION_SECONDS = 1800
"""What an operation in the group may take, as Ray Train has it."""

LEAVE_SECONDS = 30.0


class GroupError(RuntimeError):
    """Workers cannot form a process group; says who, and why."""


@dataclass(frozen=True)
class Member:
    """A worker, by where it is and how to run a function in its process."""

    host: str
    node: str  # Ray's id
    address: str
    call: Callable[..., ray.ObjectRef]

    @property
    def name(self) -> str:
        """Its node, in words."""
        return f"{self.host} ({self.address})"


def prove(members: Sequence[Member]) -> None:
    """Let workers reach each other and sum a tensor, over the interfaces that have their nodes' addresses.

    Raises:
        GroupError: says which node does not reach which, or what the first worker that failed says.
    """
    until = time.monotonic() + PROOF_SECONDS
    addresses = [(member, member.call(network.use_interface_of, member.address)) for member in members]
    used = dict(_answers(addresses, until))
    _require_reach(list({member.node: member for member in members}.values()), until)
    ((first, port),) = _answers([(members[0], members[0].call(network.free_port))], until)
    sums = [
        (member, member.call(network.exchange, rank, len(members), first.address, port, FORM_SECONDS))
        for rank, member in enumerate(members)
    ]
    for member, why in _answers(sums, until):
        if why:
            raise GroupError(
                f"the worker on {member.name} cannot form a process group over {used[member]}: {why}. "
                f"{network.GLOO} in the environment of `ray start` names another interface"
            )


def _require_reach(members: Sequence[Member], until: float) -> None:
    """Let each node open a connection to each other one."""
    if len(members) < 2:
        return
    opened = _answers([(member, member.call(network.open_door)) for member in members], until)
    doors = {member.name: (member.address, port) for member, port in opened}
    knocks = [
        (member, member.call(network.unreachable, {n: d for n, d in doors.items() if n != member.name}, KNOCK_SECONDS))
        for member in members
    ]
    found = [(member.name, name, why) for member, silent in _answers(knocks, until) for name, why in silent.items()]
    for _ in _answers([(member, member.call(network.close_door)) for member in members], until):
        pass
    if found:
        failed = sorted(f"{one} cannot reach {other}: {why}" for one, other, why in found)
        raise GroupError(f"{'; '.join(failed)}. The nodes of a cluster need all ports open among themselves")


def _answers(asked: Sequence[tuple[Member, ray.ObjectRef]], until: float) -> Iterator[tuple[Member, Any]]:
    """What workers answer, as they do.

    Raises:
        GroupError: one does not, until this time of the monotonic clock.
    """
    waiting = {answer: member for member, answer in asked}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        if not done:
            silent = ", ".join(member.name for member in waiting.values())
            raise GroupError(f"no answer from {silent} while the process group formed")
        yield waiting.pop(done[0]), ray.get(done[0])


@dataclass
class GroupConfig(BackendConfig):
    """How a lane's workers form their group: what `TorchTrainer` takes for its `TorchConfig`.

    Args:
        backend: gloo or nccl; None: `TorchTrainer` decides, by whether there are GPUs.
        mailbox: of the lane: is told where its workers are, and why they do not come together.
    """

    backend: str | None
    mailbox: Any

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls when the workers are there."""
        return _ProvedGroup

    @property
    def train_func_context(self) -> Any:
        """Within which a worker's loop runs: on its own GPU."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _ProvedGroup(Backend):
    """Ray's own group, after it has been proved that it can form."""

    share_cuda_visible_devices = True  # as Ray's own: each worker sees the GPUs of all on its node

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in Ray Train's controller."""
        members = _members(worker_group)
        places = [(member.node, member.host) for member in members]
        ray.get(backend_config.mailbox.place.remote(places, ray.get_runtime_context().current_actor))
        if len(members) > 1:
            try:
                prove(members)
            except GroupError as error:
                ray.get(backend_config.mailbox.give_up.remote(str(error)))  # now: the end of the others takes its time
                raise
        meeting = (members[0].address, ray.get(members[0].call(network.free_port)))
        size, backend = len(members), backend_config.backend
        ray.get([member.call(_form, backend, rank, size, *meeting) for rank, member in enumerate(members)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Called in Ray Train's controller before the workers end."""
        members = _members(worker_group)
        left = [member.call(_leave, len(members)) for member in members]
        ray.wait(left, num_returns=len(left), timeout=LEAVE_SECONDS)


def _members(worker_group: Any) -> list[Member]:
    """The workers, by rank."""
    return [
        Member(worker.metadata.hostname, worker.metadata.node_id, worker.metadata.node_ip, worker.execute_async)
        for worker in worker_group.get_workers()
    ]


def _form(backend: str, rank: int, size: int, address: str, port: int) -> None:
    """In a worker: form the group as Ray Train does."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, size, "env://", OPERATION_SECONDS)


def _leave(size: int) -> None:
    """In a worker: leave the group as Ray Train does, and free its GPU's memory."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=size > 1)
