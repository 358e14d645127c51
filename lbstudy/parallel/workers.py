"""The data-parallel workers of one run, and the collective operations it needs.

One worker needs no process group; several use torch.distributed's default group, which Ray Train (or a test)
has set up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process's rank among the workers of a run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Workers:
        """The workers of the default process group; a single one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors, stacked along a new first dimension in the order of ranks."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)
