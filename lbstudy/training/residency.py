"""Where a data set's images lie while a network trains on them: on the device if they fit there, else in the host's
memory, from where each mini-batch is gathered, and copied while the one before it is trained on (`staging`).

Which of the two it is changes no bit of what is learnt: the same pixels reach the device, and all else happens there.
The device of a worker without a GPU is the host's memory, and what fits there comes through Ray's object store, which
the workers of a node share. What does not fit stays in a decoded file, which they map: the system keeps as much of it
in memory as there is room for, once for all of them.
"""

from __future__ import annotations

from typing import Literal

from lbstudy.parallel.machine import machine_memory
from lbstudy.study.run import Residency

Place = Literal["device", "host"]

SHARE_OF_DEVICE = 0.5
"""Of a GPU's free memory, at most, that images may take: the rest is for the network and its activations."""

SHARE_OF_MEMORY = 0.2
"""Of the machine's memory, at most, that images may take which do not lie in a mapped file: the driver may hold them
too, and Ray's object store has three tenths of the machine's memory."""


def on_device(wanted: Residency, size: int, free: int) -> Place:
    """Where a worker has images, `size` bytes of them, with so much free memory on its GPU."""
    return _choose(wanted, size, SHARE_OF_DEVICE * free)


def on_machine(wanted: Residency, size: int) -> Place:
    """Whether a study has its images, `size` bytes of them, in memory or in a mapped file."""
    return _choose(wanted, size, SHARE_OF_MEMORY * machine_memory())


def _choose(wanted: Residency, size: int, room: float) -> Place:
    if wanted != "auto":
        return wanted
    return "device" if size <= room else "host"


def in_words(wanted: Residency, size: int, gpus: bool) -> str:
    """Where the images of a study lie.

    Args:
        wanted: what the study says.
        size: of the images, in bytes.
        gpus: whether it trains on GPUs.
    """
    found = f"{_gigabytes(size)} of images, "
    if on_machine(wanted, size) == "device":
        found += "held in memory"
    else:
        found += "mapped from a file that the workers of a node share"
        if wanted == "auto":
            found += (
                f" (up to {SHARE_OF_MEMORY:.0%} of this machine's {_gigabytes(machine_memory())} is held in memory)"
            )
    if not gpus:
        return found
    if wanted == "auto":
        return f"{found}; on GPUs with {_gigabytes(size / SHARE_OF_DEVICE)} free, else copied a mini-batch ahead"
    return f"{found}; {'on the GPU' if wanted == 'device' else 'copied to the GPU a mini-batch ahead'}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
