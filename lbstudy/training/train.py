"""One training run, top to bottom. It knows no Ray: one process, or one of several in a torch.distributed group.

The loss of a mini-batch is the mean over its samples, whoever computes them: each worker sums over its slice and
divides by the size of the *global* mini-batch, and gradients are added up over workers, ghost batches, copies and
micro-batches. So none of these numbers changes what is learnt, but for the order in which sums are rounded; in fp32
training amplifies that until runs differ as seeds do. All randomness is a function of (seed, epoch) or (seed, step);
with the same number of workers, a run continued from a `Snapshot` is the run that was never interrupted, to the bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lbstudy.methods import models, optimizers
from lbstudy.methods.smoothing import Mixing, ParameterNoise, draw_mixing, mix, mixed_cross_entropy
from lbstudy.parallel.batch_norm import has_batch_norm, renewed_statistics
from lbstudy.parallel.randomness import derive_seed
from lbstudy.parallel.workers import Workers
from lbstudy.study.run import RunSpec
from lbstudy.training.data import EpochImages, ImageData, Images, worker_slice

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of parameters; bf16 is autocast
EVALUATION_BATCH = 1024
STATISTICS_SAMPLES = 4096
"""Training samples, at least, that batch norm's running statistics are computed from before an evaluation."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to, the same on every worker."""

    epoch: int  # counted from 1
    step: int  # optimizer steps since the beginning of the run
    train_loss: float  # mean over the epoch's samples of the loss as optimised: augmented, mixed, perturbed
    val_loss: float
    val_accuracy: float  # 0 to 1
    learning_rate: float  # of the epoch's last step
    gradient_norm: float  # Euclidean, before clipping, mean over the epoch's steps
    fallbacks: int  # kfac: inversions since the beginning whose matrix was not positive definite at first
    images_per_second: float  # training samples through the whole mini-batch loop, all workers together
    seconds: float  # training and evaluation
    clean_train_loss: float | None = None  # with evaluate "all": the training images as they are, after the epoch
    clean_train_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the run has left the finite numbers, or a loss of any use."""
        return not (math.isfinite(self.train_loss) and math.isfinite(self.val_loss))


Snapshot = dict[str, Any]
"""Everything a bit-identical continuation needs: `epoch`, `step`, `model` and `optimizer` state, and the best model."""

Best = dict[str, Any]
"""The model that did best on the validation split: `epoch`, `val_accuracy` and `model` state."""

OnEpoch = Callable[[EpochReport, Callable[[], Snapshot]], bool]
"""Called on every worker after each epoch with its report and a way to take a snapshot; True ends the run."""


class Outcome(NamedTuple):
    """How a run ended."""

    model: nn.Module
    last: EpochReport
    diverged: bool
    fingerprint: str  # SHA-256 of the final model: equal fingerprints, equal runs
    best: Best | None  # with evaluate "all", where the validation split is not trained on


def train(
    run: RunSpec,
    data: ImageData,
    *,
    on_epoch: OnEpoch = lambda report, snapshot: False,
    resume: Snapshot | None = None,
) -> Outcome:
    """Train a network as the run says, on the device that holds the data.

    Args:
        run: the run.
        data: images on the training device, the same on every worker.
        on_epoch: is told each epoch's report and may end the run; must answer alike on all workers.
        resume: continue after this snapshot of the same run.

    Raises:
        ValueError: the snapshot is of a finished run.
    """
    workers, device, dtype = Workers.current(), data.train.images.device, DTYPES[run.precision]
    torch.manual_seed(derive_seed(run.seed, "initialisation"))
    model = models.build(run.model, data.shape, data.classes, run.ghost_samples).to(device, dtype)
    optimizer = optimizers.build(run, model)
    noise = None
    if run.uses("noise"):
        assert run.hyper.noise_magnitude is not None
        noise = ParameterNoise(model, run.noise, run.hyper.noise_magnitude, run.seed)

    step = first_epoch = 0
    best: Best | None = None
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        first_epoch, step, best = resume["epoch"], resume["step"], resume["best"]
    network = _parallel(torch.compile(model) if run.compile else model, workers, device)  # type: ignore[arg-type]

    starts = minibatch_starts(len(data.train), run)
    total_steps = run.budget.total_steps(len(starts))
    total_epochs = run.budget.total_epochs(len(starts))
    if first_epoch >= total_epochs:
        raise ValueError(f"nothing to resume: the snapshot is of epoch {first_epoch} of {total_epochs}")

    for epoch in range(first_epoch + 1, total_epochs + 1):
        began = time.perf_counter()
        model.train()
        images = EpochImages(data, run.dataset, run.seed, epoch, dtype)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        norm_sum = torch.zeros((), dtype=torch.float64, device=device)
        samples = steps = 0
        for start in starts[: total_steps - step]:
            size = min(run.batch_size, len(data.train) - start)
            mixing = _draw_mixing(run, step, size, images)
            rate = optimizers.set_course(optimizer, run, step, len(starts))
            optimizer.zero_grad(set_to_none=True)
            for forward in forward_passes(run, size, workers):
                positions = torch.arange(start + forward.part.start, start + forward.part.stop, device=device)
                statistics = _capture(optimizer, forward, size)
                with _noisy(noise, run, step, forward), forward.gradient_sync(network), statistics:
                    loss = _loss_sum(network, images, positions, start, mixing and mixing.part(forward.part), run)
                    loss = loss / forward.copies
                    (loss * (workers.size / size)).backward()  # DistributedDataParallel averages; we want the sum
                loss_sum += loss.detach()
            norm_sum += _clip_gradient(model, run.hyper.gradient_clip)
            optimizer.step()
            if noise is not None and not run.noise.denoise:
                noise.add(step)
            step, samples, steps = step + 1, samples + size, steps + 1

        sums = workers.sum(torch.stack([loss_sum, norm_sum / workers.size])).tolist()
        trained = time.perf_counter() - began
        renew_statistics(model, images, run, starts[:steps], step)
        evaluations = _evaluations(model, data, run)
        best = _better(best, epoch, evaluations["val_accuracy"], model, run)
        report = EpochReport(
            epoch=epoch,
            step=step,
            train_loss=sums[0] / samples,
            learning_rate=rate,
            gradient_norm=sums[1] / steps,
            fallbacks=optimizer.fallbacks if isinstance(optimizer, optimizers.KFAC) else 0,
            images_per_second=samples / trained,
            seconds=time.perf_counter() - began,
            **evaluations,
        )

        def snapshot(epoch: int = epoch, step: int = step, best: Best | None = best) -> Snapshot:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            return {"epoch": epoch, "step": step, "best": best, **state}

        if on_epoch(report, snapshot) or report.diverged:
            break
    return Outcome(model, report, report.diverged, fingerprint(model), best)


class ForwardPass(NamedTuple):
    """One forward and backward pass of a worker: a part of the mini-batch under one draw of the noise."""

    part: slice  # of the global mini-batch; empty for a worker without samples
    ghost_batch: int
    copy: int
    copies: int
    last: bool  # of this worker's passes in the step: gradients are reduced while it runs backward

    def gradient_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients local until the last pass."""
        local = isinstance(network, DistributedDataParallel) and not self.last
        return network.no_sync() if local else nullcontext()  # type: ignore[operator]


def minibatch_starts(samples: int, run: RunSpec) -> range:
    """Where each mini-batch of an epoch begins; the last one is shorter unless `drop_last` leaves it out."""
    if run.dataset.drop_last and samples > run.batch_size:
        samples -= samples % run.batch_size
    return range(0, samples, run.batch_size)


def forward_passes(run: RunSpec, size: int, workers: Workers) -> list[ForwardPass]:
    """How a worker goes through its slice of a mini-batch of `size` samples: by noise draw, copy and micro-batch."""
    mine = worker_slice(size, workers.rank, workers.size, run.slice_unit)
    ghost = run.noise.ghost if run.uses("noise") else None
    copies = run.noise.copies if run.uses("noise") else 1
    passes = [
        ForwardPass(micro, part.start // ghost if ghost else 0, copy, copies, last=False)
        for part in _cut(mine, ghost)
        for copy in range(copies)
        for micro in _cut(part, run.micro_batch_size)
    ]
    passes[-1] = passes[-1]._replace(last=True)
    return passes


def _cut(part: slice, size: int | None) -> Iterator[slice]:
    """Pieces of at most `size` samples; an empty part is one empty piece, for its worker must take part too."""
    if size is None or part.start == part.stop:
        yield part
    else:
        for start in range(part.start, part.stop, size):
            yield slice(start, min(start + size, part.stop))


def _draw_mixing(run: RunSpec, step: int, size: int, images: EpochImages) -> Mixing | None:
    if not run.uses("mixup"):
        return None
    assert run.hyper.mixup_alpha is not None
    return draw_mixing(run.mixup, run.hyper.mixup_alpha, run.seed, step, size, images.order.device, images.dtype)


@torch.no_grad()
def renew_statistics(model: nn.Module, images: EpochImages, run: RunSpec, starts: range, step: int) -> None:
    """Make batch norm's running statistics those of the present weights, for the evaluation that follows.

    One rule for every cell: forward passes over the epoch's last mini-batches, as they were trained on (augmented,
    mixed, in their ghost batches) but without parameter noise, until they hold STATISTICS_SAMPLES samples or all.

    Args:
        model: in training mode; without batch norm nothing happens.
        images: of the epoch.
        run: the run.
        starts: of the epoch's mini-batches so far.
        step: optimizer steps since the beginning of the run.
    """
    if not has_batch_norm(model):
        return
    workers, seen = Workers.current(), 0
    with renewed_statistics(model, workers):
        for back, start in enumerate(reversed(starts), start=1):
            size = min(run.batch_size, len(images.order) - start)
            mixing = _draw_mixing(run, step - back, size, images)
            mine = worker_slice(size, workers.rank, workers.size, run.slice_unit)
            for part in _cut(mine, run.micro_batch_size):
                positions = torch.arange(start + part.start, start + part.stop, device=images.order.device)
                inputs, *_ = _inputs(images, positions, start, mixing and mixing.part(part))
                with _autocast(run.precision, inputs.device):
                    model(inputs)
            seen += size
            if seen >= STATISTICS_SAMPLES:
                break


def _parallel(network: nn.Module, workers: Workers, device: torch.device) -> nn.Module:
    if workers.size == 1:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # batch norm's are equal by construction
        find_unused_parameters=True,  # else the first step sums in another order than the rest, also after a resume
        gradient_as_bucket_view=True,
    )


def _noisy(noise: ParameterNoise | None, run: RunSpec, step: int, forward: ForwardPass) -> AbstractContextManager[None]:
    if noise is None or not run.noise.denoise:
        return nullcontext()
    return noise.perturbed(step, forward.ghost_batch, forward.copy)


def _capture(optimizer: torch.optim.Optimizer, forward: ForwardPass, size: int) -> AbstractContextManager[None]:
    if not isinstance(optimizer, optimizers.KFAC):
        return nullcontext()
    return optimizer.capture(size, forward.part, forward.copy, forward.copies, forward.last)


def _loss_sum(
    network: nn.Module, images: EpochImages, positions: Tensor, start: int, mixing: Mixing | None, run: RunSpec
) -> Tensor:
    """Summed loss of these positions of the epoch."""
    inputs, labels, partner_labels = _inputs(images, positions, start, mixing)
    with _autocast(run.precision, inputs.device):
        logits = network(inputs)
    logits = logits.to(inputs.dtype)
    if mixing is None or partner_labels is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    return mixed_cross_entropy(logits, labels, partner_labels, mixing.coefficients)


def _inputs(
    images: EpochImages, positions: Tensor, start: int, mixing: Mixing | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and labels of these positions of the epoch; where they are mixed, the partners' labels too."""
    inputs, labels = images.images(positions), images.labels(positions)
    if mixing is None:
        return inputs, labels, None
    partners = start + mixing.partners
    return mix(inputs, images.images(partners), mixing.coefficients), labels, images.labels(partners)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _clip_gradient(model: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradient down to this global norm; returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm


def _evaluations(model: nn.Module, data: ImageData, run: RunSpec) -> dict[str, float]:
    """Loss and accuracy on what the run evaluates."""
    parts = {"val": data.validation}
    if run.evaluate == "all":
        parts |= {"clean_train": data.train, "test": data.test}
    found = {}
    for name, images in parts.items():
        found[f"{name}_loss"], found[f"{name}_accuracy"] = evaluate(model, data, images, run.precision)
    return found


def _better(best: Best | None, epoch: int, val_accuracy: float, model: nn.Module, run: RunSpec) -> Best | None:
    """The best model so far on the validation split; the earlier one where two are equal."""
    if run.evaluate != "all" or run.train_on == "all" or (best and val_accuracy <= best["val_accuracy"]):
        return best
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {"epoch": epoch, "val_accuracy": val_accuracy, "model": state}


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageData, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Mean loss and accuracy on these images, without augmentation; every worker computes its share of the samples."""
    workers, dtype = Workers.current(), DTYPES[precision]
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=images.images.device)
    for part in _cut(worker_slice(len(images), workers.rank, workers.size), EVALUATION_BATCH):
        inputs, labels = data.normalise(images.images[part], dtype), images.labels[part]
        with _autocast(precision, inputs.device):
            logits = model(inputs)
        sums[0] += F.cross_entropy(logits.to(dtype), labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    model.train(training)
    loss, correct = workers.sum(sums).tolist()
    return loss / len(images), correct / len(images)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and bits of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
