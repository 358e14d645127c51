"""What a run's steps work with, and how a worker computes its share of a mini-batch's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lbstudy.methods import models, optimizers, smoothing
from lbstudy.methods.smoothing import Inputs
from lbstudy.parallel.batch_norm import has_batch_norm
from lbstudy.parallel.randomness import derive_seed
from lbstudy.parallel.workers import Workers
from lbstudy.study.run import RunSpec
from lbstudy.training.data import EpochImages, worker_slice

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of parameters; bf16 is autocast


class MiniBatch(NamedTuple):
    """A mini-batch of an epoch."""

    step: int  # optimizer steps before this one
    start: int  # where it begins in the epoch
    size: int  # samples
    images: EpochImages

    def part(self, positions: slice) -> smoothing.Part:
        """These samples of it."""

        device = self.images.order.device

        def fetch(chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
            begin, end = 0, self.size
            if isinstance(chosen, slice):
                begin, end = chosen.start, chosen.stop
                chosen = torch.arange(begin, end, device=device)
            places, among = self.start + chosen, slice(self.start + begin, self.start + end)
            return self.images.images(places, among), self.images.labels(places)

        return smoothing.Part(self.step, self.size, positions, fetch, device, self.images.dtype)


class ForwardPass(NamedTuple):
    """One forward and backward pass of a worker: a part of the mini-batch under one draw of the smoothing."""

    positions: slice  # in the global mini-batch; empty for a worker without samples
    ghost_batch: int
    copy: int
    last: bool  # of this worker's passes in the step: gradients are reduced while it runs backward


class Loop(NamedTuple):
    """What the steps of a run work with."""

    run: RunSpec
    model: nn.Module
    network: nn.Module  # the model, compiled and parallel
    optimizer: torch.optim.Optimizer
    course: optimizers.RunCourse
    smoothing: smoothing.Combined
    workers: Workers
    slice_unit: int  # workers' slices begin at multiples of this, so that no ghost batch is torn apart

    @classmethod
    def of(cls, run: RunSpec, model: nn.Module, steps_per_epoch: int) -> Loop:
        """The loop of a run, with a model on the training device."""
        workers, optimizer, smooth = Workers.current(), optimizers.build(run, model), smoothing.build(run, model)
        ghosts = [run.ghost if has_batch_norm(model) else None, smooth.ghost]
        loop = cls(
            run,
            model,
            _parallel(torch.compile(model) if run.compile else model, workers),  # type: ignore[arg-type]
            optimizer,
            optimizers.RunCourse(optimizer, run, steps_per_epoch),
            smooth,
            workers,
            math.lcm(*(ghost or 1 for ghost in ghosts)),
        )
        if loop._switches:
            optimizer.train()  # type: ignore[attr-defined]
        return loop

    def share(self, size: int) -> slice:
        """What a worker takes of a mini-batch of `size` samples."""
        return worker_slice(size, self.workers.rank, self.workers.size, self.slice_unit)

    def forward_passes(self, size: int) -> list[list[ForwardPass]]:
        """How a worker goes through its slice of a mini-batch of `size` samples: by ghost batch of the smoothing (one
        list each), copy and micro-batch."""
        mine = self.share(size)
        ghost = self.smoothing.ghost
        passes = [
            [
                ForwardPass(micro, part.start // ghost if ghost else 0, copy, last=False)
                for copy in range(self.smoothing.copies)
                for micro in cut(part, self.run.micro_batch_size)
            ]
            for part in cut(mine, ghost)
        ]
        passes[-1][-1] = passes[-1][-1]._replace(last=True)
        return passes

    def gradient(self, batch: MiniBatch, passes: list[ForwardPass], ascent: bool = False) -> Tensor:
        """Add the gradient of the mini-batch's mean loss over these passes to the parameters'. Returns the sum of the
        losses, over this worker's samples. With `ascent` it is on the way to where a gradient will be taken, and the
        optimizer does not look."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=batch.images.order.device)
        share = self.workers.size / batch.size  # parallel gradients are means; we want the sum
        for forward in passes:
            perturbed = self.smoothing.perturbed(smoothing.Draw(batch.step, forward.ghost_batch, forward.copy))
            watched = nullcontext() if ascent else self._watched(batch, forward)
            with perturbed, self._reduced(forward.last), watched:
                logits, inputs = self.outputs(self.network, batch, forward.positions, forward.copy)
                loss = self.smoothing.loss_sum(logits.to(inputs.images.dtype), inputs)
                if self.smoothing.copies > 1:
                    loss = loss / self.smoothing.copies
                loss.backward(torch.full_like(loss, share))
            loss_sum += loss.detach()
        return loss_sum

    def outputs(self, network: nn.Module, batch: MiniBatch, positions: slice, copy: int = 0) -> tuple[Tensor, Inputs]:
        """Logits of these samples from a pass of the network, in its mode, and what was put in.

        What a network draws itself, for dropout or stochastic depth, it draws from torch's global generator; here that
        becomes a function of (seed, step, first sample, copy). So a resumed run draws what the uninterrupted one does,
        and SAM's two passes drop the same; but cut into other parts, by workers or micro-batches, a mini-batch gets
        other draws.
        """
        seed_generator(
            batch.images.order.device, derive_seed(self.run.seed, "network", batch.step, positions.start, copy)
        )
        inputs = self.smoothing.inputs(batch.part(positions))
        with autocast(self.run.precision, inputs.images.device):
            return network(inputs.images), inputs

    def ascent(self, batch: MiniBatch, passes: list[ForwardPass]) -> list[Tensor]:
        """The gradient of these passes at the present weights, one entry a parameter; the gradient so far stays. It is
        of the mini-batch, over all workers, where the passes are all of it, and of one ghost batch else, which one
        worker holds."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        so_far = [None if p.grad is None else p.grad.clone() for p in parameters]  # buckets are used again
        self.optimizer.zero_grad(set_to_none=True)
        whole = self.smoothing.ghost is None
        self.gradient(batch, [forward._replace(last=whole and forward.last) for forward in passes], ascent=True)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter, gradient in zip(parameters, so_far, strict=True):
            parameter.grad = gradient
        return found

    def _watched(self, batch: MiniBatch, forward: ForwardPass) -> AbstractContextManager[None]:
        """K-FAC's statistics, or whatever an optimizer wants to see of a pass."""
        capture = getattr(self.optimizer, "capture", None)
        if capture is None:
            return nullcontext()
        return capture(batch.size, forward.positions, forward.copy, self.smoothing.copies, forward.last)

    def _reduced(self, last: bool) -> AbstractContextManager[None]:
        """Keep gradients local until the last pass."""
        local = isinstance(self.network, DistributedDataParallel) and not last
        return self.network.no_sync() if local else nullcontext()  # type: ignore[operator]

    @property
    def averages(self) -> bool:
        """Whether other weights are evaluated than are trained."""
        return self.smoothing.averages or self._switches

    @property
    def _switches(self) -> bool:
        return hasattr(self.optimizer, "eval") and hasattr(self.optimizer, "train")

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within it the model has the weights that are evaluated."""
        if self._switches:
            self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            with self.smoothing.averaged():
                yield
        finally:
            if self._switches:
                self.optimizer.train()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """What a continuation needs, beside the step."""
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "smoothing")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for name in ("model", "optimizer", "smoothing"):
            getattr(self, name).load_state_dict(state[name])


def cut(part: slice, size: int | None) -> Iterator[slice]:
    """Pieces of at most `size` samples; an empty part is one empty piece, for its worker must take part too."""
    if size is None or part.start == part.stop:
        yield part
    else:
        for start in range(part.start, part.stop, size):
            yield slice(start, min(start + size, part.stop))


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the global generator of a device, and the CPU's; torch.manual_seed does so too, but in a third of a
    millisecond, for it goes through all the devices there may be."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Around forward passes: bfloat16 where the precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """How convolutions' weights lie in memory, which their results follow: as they are fastest. On CPUs that is with
    the channels last, and on GPUs in bfloat16, whose kernels are made so (benchmarks/throughput.py); float64 has no
    such kernels."""
    fast = precision == "bf16" or (precision == "fp32" and device.type == "cpu")
    return torch.channels_last if fast else torch.contiguous_format


def placed(model: nn.Module, shape: models.Shape, device: torch.device, precision: str) -> nn.Module:
    """The model on a device, in the format in memory that is fastest there, if it works in that; a network that takes
    `view`s of what its convolutions give does not.

    Args:
        model: as it was built.
        shape: channels, height and width of an image.
        device: to train on.
        precision: of the run.
    """
    model = model.to(device, DTYPES[precision])
    if memory_format(device, precision) is torch.channels_last:
        model = model.to(memory_format=torch.channels_last)
        if not models.works_with_channels_last(model, shape):
            model = model.to(memory_format=torch.contiguous_format)
    return model


def format_of(model: nn.Module) -> torch.memory_format:
    """How a model's convolutions lie in memory, and so its images should."""
    kernels = (p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous())
    last = any(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    return torch.channels_last if last else torch.contiguous_format


def clip_gradient(parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
    """Scale the gradient down to this global norm; returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _parallel(network: nn.Module, workers: Workers) -> nn.Module:
    if workers.size == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # batch norm's are equal by construction
        find_unused_parameters=True,  # else the first step sums in another order than the rest, also after a resume
        gradient_as_bucket_view=True,
    )
