"""Runs a function in several processes joined by gloo, without Ray."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    result = function(*args)
    dist.barrier()
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.destroy_process_group()


def run_workers(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns on rank 0 of `size` workers; a single worker runs here, without a group."""
    if size == 1:
        return function(*args)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entry, (size, folder, function, args), nprocs=size, start_method="spawn")
        return torch.load(Path(folder) / "result.pt", weights_only=False)
