"""Images on their way from the host's memory to the device where they are worked with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor


def room(device: torch.device, share: float = 1.0) -> int:
    """Bytes of a GPU's memory that are free for a process to which a share of it belongs."""
    free, total = torch.cuda.mem_get_info(device)
    return int(min(free, share * total))


def gather(pixels: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """These images, on the device.

    Args:
        pixels: N x ..., there or in the host's memory.
        rows: which of them, k, beside them.
        device: where to.
    """
    if pixels.device.type == device.type:
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
