"""What the workers of a K-FAC run exchange: sums of factors, and the inverses each has computed for the others.

Symmetric matrices travel as packed upper triangles, in buckets. Sums are all-reduced, not reduce-scattered to the
worker that inverts: every worker then holds the running averages, so any one of them can write a checkpoint, and
the split of the inversions may follow their cost alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lbstudy.parallel.workers import Workers

BUCKET_BYTES = 25 * 2**20


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle of an n x n matrix as a vector of n (n + 1) / 2 numbers.

    With the matrix in blocks [[P, Q], [., R]], R at least as large as P: Q whole, then P's triangle beside R's
    transposed strict triangle in one rectangle, then R's diagonal. No index arrays, which would outweigh the matrix.
    """
    half = len(matrix) // 2
    rest = matrix[half:, half:]
    rectangle = rest.mT[:, :half].tril(-1)
    rectangle[:half] += matrix[:half, :half].triu()
    return torch.cat([matrix[:half, half:].flatten(), rectangle.flatten(), rest.diagonal()])


def unpack(vector: Tensor, order: int) -> Tensor:
    """The upper triangular matrix of this order that `pack` made a vector."""
    half = order // 2
    size = order - half
    corner, rectangle, diagonal = vector.split([half * size, size * half, size])
    rectangle = rectangle.view(size, half)
    matrix = vector.new_zeros(order, order)
    matrix[:half, half:] = corner.view(half, size)
    matrix[:half, :half] = rectangle[:half].triu()
    matrix[half : half + half, half:] = rectangle.tril(-1).mT
    matrix[half:, half:].diagonal().copy_(diagonal)
    return matrix


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return upper + upper.triu(1).mT


class PendingSum:
    """Sums over the workers of some vectors, under way since the object was made.

    Every worker must make it at the same point of its sequence of collective operations.
    """

    def __init__(self, vectors: Sequence[Tensor], workers: Workers):
        self._vectors = list(vectors)
        self._buckets: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        if workers.size > 1:
            for bucket in _buckets(self._vectors):
                flat = torch.cat(bucket)
                work = dist.all_reduce(flat, async_op=True)
                assert work is not None
                self._buckets.append((bucket, flat, work))

    def wait(self) -> list[Tensor]:
        """The sums, in the order of the vectors."""
        if not self._buckets:
            return self._vectors
        sums: list[Tensor] = []
        for bucket, flat, work in self._buckets:
            work.wait()
            sums += flat.split([len(vector) for vector in bucket])
        return sums


def _buckets(vectors: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive vectors of BUCKET_BYTES together, or a single larger one."""
    buckets: list[list[Tensor]] = []
    room = 0
    for vector in vectors:
        size = vector.numel() * vector.element_size()
        if size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(vector)
        room -= size
    return buckets


def assign(costs: Sequence[float], workers: int) -> list[int]:
    """Which worker does which task: the dearest first, each to the worker with the least to do so far."""
    loads = [0.0] * workers
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: (-costs[task], task)):
        owner = loads.index(min(loads))
        owners[task] = owner
        loads[owner] += costs[task]
    return owners


def share(vectors: Sequence[Tensor], owners: Sequence[int], workers: Workers) -> list[Tensor]:
    """Every vector as its owner has it; the other workers give one of the same length."""
    if workers.size == 1:
        return list(vectors)
    shared = list(vectors)
    pending = []
    for owner in range(workers.size):
        tasks = [task for task, its_owner in enumerate(owners) if its_owner == owner]
        if tasks:
            flat = torch.cat([vectors[task] for task in tasks])
            pending.append((tasks, flat, dist.broadcast(flat, src=owner, async_op=True)))
    for tasks, flat, work in pending:
        work.wait()  # type: ignore[union-attr]
        for task, vector in zip(tasks, flat.split([len(vectors[task]) for task in tasks]), strict=True):
            shared[task] = vector
    return shared
