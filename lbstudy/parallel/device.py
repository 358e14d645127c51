"""What is asked of the device of a run: copies that nobody waits for, and kernels that give the same bits again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The values as a tensor there. A GPU copies them in the order of its work, from pinned memory, and the host goes
    on: a plain `.to(device)` would wait until the device has done all that was asked of it before."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """On CUDA, no TF32 (fp32 with ten bits of mantissa, which cuDNN takes by default) and convolutions that give the
    same bits every time; without `benchmark`, which chooses among kernels by their times of the moment."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
