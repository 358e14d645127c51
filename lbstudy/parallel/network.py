"""Whether workers on several machines reach each other, and over which network interface.

gloo and NCCL choose an interface by themselves: gloo the one that the machine's own name resolves to, which on Debian
and Ubuntu is a loopback address (127.0.1.1) that no other machine reaches. The functions here run in a worker each, in
this order: `use_interface_of` before a process group forms, `open_door` and `unreachable` to find out who reaches
whom, `exchange` to form a group for a moment and see a tensor go round.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_door: list[socket.socket] = []  # where this process waits for the others' knocks


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None where none has, behind a translation of addresses say."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def use_interface_of(address: str) -> str:
    """Let process groups of this process use the interface with this address, unless the user has chosen one.

    Returns:
        What they use now, in words.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(GLOO, name)
        os.environ.setdefault(NCCL, f"={name}")  # without the sign, NCCL takes every name that begins so
    chosen = os.environ.get(GLOO)
    return f"interface {chosen}" if chosen else "the interface that its own name resolves to"


def open_door() -> int:
    """Listen for the other workers; returns the port."""
    close_door()
    _door.append(socket.create_server(("", 0), backlog=64))
    return int(_door[0].getsockname()[1])


def close_door() -> None:
    """Listen no more."""
    while _door:
        _door.pop().close()


def unreachable(doors: Mapping[str, tuple[str, int]], seconds: float) -> dict[str, str]:
    """Knock at the other workers' doors, at all of them at once.

    Args:
        doors: address and port of each, by its name.
        seconds: to wait for them.

    Returns:
        Why not, for each that cannot be reached.
    """

    def knock(door: tuple[str, int]) -> str:
        try:
            socket.create_connection(door, timeout=seconds).close()
        except OSError as error:
            return f"{door[0]}: {error.strerror or error}"
        return ""

    with ThreadPoolExecutor(len(doors) or 1) as pool:
        return {name: why for name, why in zip(doors, pool.map(knock, doors.values()), strict=True) if why}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    port = open_door()
    close_door()
    return port


def exchange(rank: int, size: int, address: str, port: int, seconds: float) -> str:
    """Form a process group of gloo's with the others, sum a tensor over it, and leave it.

    Args:
        rank: of this worker.
        size: number of workers.
        address: of the first worker, where the others meet it.
        port: likewise; nobody listens there yet.
        seconds: until it is given up.

    Returns:
        Why it has not come about, or nothing.
    """
    import torch
    import torch.distributed as dist

    try:
        host = f"[{address}]" if ":" in address else address
        timeout = timedelta(seconds=seconds)
        dist.init_process_group("gloo", f"tcp://{host}:{port}", timeout, world_size=size, rank=rank)
        ones = torch.ones(1)
        dist.all_reduce(ones)
        if ones.item() != size:
            return f"the sum of {size} ones came back as {ones.item():g}"
    except Exception as error:  # torch raises several kinds, and plain RuntimeError
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        with suppress(Exception):  # of a group that has not formed
            if dist.is_initialized():
                dist.destroy_process_group()
    return ""
