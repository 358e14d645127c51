"""Where a data set's images lie while a network trains on them: on the device if they fit there, else in the host's
memory, from where each mini-batch is gathered and copied while the one before it is trained on.

Which of the two it is changes no bit of what is learnt: the same pixels reach the device, and all else happens there.
A CPU works on the host's memory as it is, so there nothing is copied but the images of a mini-batch, as they are
gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lbstudy.study.run import Residency

Place = Literal["device", "host"]

SHARE_OF_DEVICE = 0.5
"""Of a GPU's free memory, at most, that images may take: the rest is for the network and its activations."""

SHARE_OF_MEMORY = 0.2
"""Of the machine's memory, at most, that images may take which do not lie in a mapped file: the driver holds them and
Ray's object store does, which has three tenths of the machine's memory. Workers share the latter."""

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use, by version of its control groups."""


def choose(wanted: Residency, size: int, free: int, share: float) -> Place:
    """Where images lie.

    Args:
        wanted: what the study says.
        size: of all images, in bytes.
        free: bytes of memory.
        share: of it, that images may take.
    """
    if wanted != "auto":
        return wanted
    return "device" if size <= share * free else "host"


def on_device(wanted: Residency, size: int, device: torch.device) -> Place:
    """Where images of so many bytes lie for a worker that trains on this device."""
    if device.type != "cuda":
        return "device"  # its memory is the host's
    return choose(wanted, size, torch.cuda.mem_get_info(device)[0], SHARE_OF_DEVICE)


def on_machine(wanted: Residency, size: int) -> Place:
    """Whether the images of a study are held in this machine's memory, or stay in a mapped file."""
    return choose(wanted, size, machine_memory(), SHARE_OF_MEMORY)


def machine_memory() -> int:
    """Bytes of memory that there are for this machine's processes, or for those of this container."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in LIMITS:
        with suppress(OSError, ValueError):  # elsewhere than on Linux; "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def gather(pixels: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """These images of the host's memory, on the device.

    Args:
        pixels: N x ..., in the host's memory.
        rows: which of them, k, likewise.
        device: where to.
    """
    if device.type != "cuda":
        return pixels.index_select(0, rows)
    pinned = torch.empty((len(rows), *pixels.shape[1:]), dtype=pixels.dtype, pin_memory=True)
    return torch.index_select(pixels, 0, rows, out=pinned).to(device, non_blocking=True)


def one_ahead(pixels: Tensor, parts: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """`gather` of one part after another; while the caller works with one, the next is gathered and copied.

    Args:
        pixels: N x ..., in the host's memory.
        parts: the rows of each.
        device: where to; on a GPU the copies go through a stream of their own.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return gather(pixels, rows, device), stream.record_event() if stream else None

    left = iter(parts)
    with ThreadPoolExecutor(1, "one_ahead") as thread:
        coming = [thread.submit(bring, rows) for rows in islice(left, 1)]
        while coming:
            here, copied = coming[0].result()
            coming = [thread.submit(bring, rows) for rows in islice(left, 1)]
            if copied is not None:
                now = torch.cuda.current_stream(device)
                now.wait_event(copied)
                here.record_stream(now)  # its memory is free for the next but one when the caller's work is done
            yield here
