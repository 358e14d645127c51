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
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods import configure, models
from lbstudy.parallel.batch_norm import has_batch_norm, renewed_statistics
from lbstudy.parallel.device import exact_kernels
from lbstudy.parallel.randomness import derive_seed
from lbstudy.parallel.workers import Workers
from lbstudy.study.run import RunSpec
from lbstudy.training.data import EpochImages, ImageData, Images, worker_slice
from lbstudy.training.graphs import replaying
from lbstudy.training.loop import DTYPES, Loop, MiniBatch, autocast, clip_gradient, cut, format_of, placed
from lbstudy.training.pursuit import Pursuit

EVALUATION_BATCH = 512
EVALUATION_BYTES = 1 << 26
"""Of normalised images, at most, that are evaluated together: fewer than 512 where they have more than 104 x 104
pixels, since the activations of a network take many times as much."""

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
    fallbacks: int  # of the optimizer since the beginning; kfac: inversions not positive definite at first
    images_per_second: float  # training samples through the whole mini-batch loop, all workers together
    seconds: float  # training and evaluation
    images: int  # training samples seen since the beginning of the run
    clean_train_loss: float | None = None  # with evaluate "all": the training images as they are, after the epoch
    clean_train_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    within: list[dict[str, float]] | None = None
    """Evaluations within the epoch: `step`, `epochs` (with a part of one, by its steps), `seconds` (of the epoch so
    far), `val_loss`, `val_accuracy`, and `clean_train_loss` and `clean_train_accuracy` where the target is about it."""
    run_seconds: float | None = None  # this and what follows is there if the run has a target, see `Pursuit`
    nearest: float | None = None
    steps_to_target: int | None = None
    epochs_to_target: float | None = None
    seconds_to_target: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the run has left the finite numbers, or a loss of any use."""
        return not (math.isfinite(self.train_loss) and math.isfinite(self.val_loss))

    def is_last(self, run: RunSpec, epochs: int) -> bool:
        """Whether a run of so many epochs ends with this one by itself."""
        there = run.until_target and self.steps_to_target is not None
        return self.epoch == epochs or self.diverged or there


Snapshot = dict[str, Any]
"""Everything a bit-identical continuation needs: `epoch`, `step`, the state of `model`, `optimizer` and `smoothing`,
the best model, and how near the target it has come; and the model `evaluated`, which is another where weights are
averaged."""

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


@exact_kernels()
def train(
    run: RunSpec,
    data: ImageData,
    *,
    on_epoch: OnEpoch = lambda report, snapshot: False,
    resume: Snapshot | None = None,
) -> Outcome:
    """Train a network as the run says, on the device that holds the data; on a GPU its peaks of memory begin anew.

    Args:
        run: the run.
        data: images on the training device, the same on every worker.
        on_epoch: is told each epoch's report and may end the run; must answer alike on all workers.
        resume: continue after this snapshot of the same run.

    Raises:
        ValueError: the snapshot is of a finished run.
    """
    configure.require(run)
    device = data.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(derive_seed(run.seed, "initialisation"))
    model = models.build(run.model.name, data.shape, data.classes, run.ghost, run.model.settings)
    model = placed(model, data.shape, device, run.precision)
    layout = format_of(model)
    starts, extent = minibatch_starts(len(data.train), run), run.extent(len(data.train))
    loop = Loop.of(run, model, extent.steps_per_epoch)

    parameters = list(model.parameters())  # to go through a model's modules takes longer than to clip

    step = first_epoch = 0
    best: Best | None = None
    pursuit = Pursuit(run.target)
    if resume is not None:
        loop.load_state_dict(resume)
        first_epoch, step, best = resume["epoch"], resume["step"], resume["best"]
        pursuit.load_state_dict(resume.get("pursuit", {}))
    total_steps, total_epochs = extent.steps, extent.epochs
    if first_epoch >= total_epochs:
        raise ValueError(f"nothing to resume: the snapshot is of epoch {first_epoch} of {total_epochs}")

    for epoch in range(first_epoch + 1, total_epochs + 1):
        began = time.perf_counter()
        model.train()
        images = EpochImages(data, run.dataset, run.seed, epoch, DTYPES[run.precision], layout)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        norm_sum = torch.zeros((), dtype=torch.float64, device=device)
        samples = steps = 0
        before, paused, within = pursuit.run_seconds or 0.0, 0.0, list[dict[str, float]]()
        if epoch == first_epoch + 2:
            loop = replaying(loop, data)
            paused = time.perf_counter() - began
        planned = starts[: total_steps - step]
        for start in images.in_turn(planned, partial(_share, loop, len(data.train))):
            batch = MiniBatch(step, start, min(run.batch_size, len(data.train) - start), images)
            rate = loop.course.set(step)
            loop.optimizer.zero_grad(set_to_none=True)
            for passes in loop.forward_passes(batch.size):
                with loop.smoothing.ascended(step, partial(loop.ascent, batch, passes)):
                    loss_sum += loop.gradient(batch, passes)
            norm_sum += clip_gradient(parameters, run.hyper.get("gradient_clip"))
            loop.optimizer.step()
            loop.smoothing.after_step(step)
            step, samples, steps = step + 1, samples + batch.size, steps + 1
            if steps < len(planned) and run.evaluate_every and step % run.evaluate_every == 0:
                pause = time.perf_counter()
                found = _evaluate_within(loop, data, images, starts[:steps], step)
                paused += time.perf_counter() - pause
                found |= {"step": step, "epochs": step / len(starts), "seconds": time.perf_counter() - began}
                if pursuit.see(found, before) and run.until_target:
                    break  # the epoch ends here, and its report is this evaluation
                within.append(found)

        sums = loop.workers.sum(torch.stack([loss_sum, norm_sum / loop.workers.size])).tolist()
        trained = time.perf_counter() - began - paused
        with loop.evaluated():
            renew_statistics(loop, images, starts[:steps], step, within=steps < len(planned))
            evaluations = _evaluations(model, data, run)
            best = _better(best, epoch, evaluations["val_accuracy"], model, run)
            kept = copy_of_state(model) if loop.averages else None
        seconds = time.perf_counter() - began
        pursuit.see(evaluations | {"step": step, "epochs": step / len(starts), "seconds": seconds}, before)
        report = EpochReport(
            epoch=epoch,
            step=step,
            train_loss=sums[0] / samples,
            learning_rate=rate,
            gradient_norm=sums[1] / steps,
            fallbacks=getattr(loop.optimizer, "fallbacks", 0),
            images_per_second=samples / trained,
            seconds=seconds,
            within=within or None,
            images=extent.images(step),
            **evaluations,
            **pursuit.state_dict(),
        )

        def snapshot(
            loop: Loop = loop, epoch: int = epoch, step: int = step, best: Best | None = best, kept: Any = kept
        ) -> Snapshot:  # fmt: skip
            state = {"epoch": epoch, "step": step, "best": best, "pursuit": pursuit.state_dict(), **loop.state_dict()}
            return state | {"evaluated": state["model"] if kept is None else kept}

        if on_epoch(report, snapshot) or report.is_last(run, total_epochs):
            break
    if kept is not None:
        model.load_state_dict(kept)
    return Outcome(model, report, report.diverged, fingerprint(model), best)


def _share(loop: Loop, samples: int, start: int) -> slice:
    """The positions in an epoch of `samples` that a worker takes of the mini-batch with this start."""
    mine = loop.share(min(loop.run.batch_size, samples - start))
    return slice(start + mine.start, start + mine.stop)


def minibatch_starts(samples: int, run: RunSpec) -> range:
    """Where each mini-batch of an epoch begins; the last one is shorter unless `drop_last` leaves it out."""
    if run.dataset.drop_last and samples > run.batch_size:
        samples -= samples % run.batch_size
    return range(0, samples, run.batch_size)


@torch.no_grad()
def renew_statistics(loop: Loop, images: EpochImages, starts: range, step: int, within: bool = False) -> None:
    """Make batch norm's running statistics those of the present weights, for the evaluation that follows.

    One rule for every cell: forward passes over the epoch's last mini-batches, with the inputs that they were trained
    on (augmented, mixed, in their ghost batches) but at the weights that are evaluated, until they hold
    STATISTICS_SAMPLES samples or all. Within an epoch those of the epoch before come after its own, until they hold as
    many as an epoch has, since there may have been few.

    Args:
        loop: its model in training mode; without batch norm nothing happens.
        images: of the epoch.
        starts: of the epoch's mini-batches so far.
        step: optimizer steps since the beginning of the run.
        within: the epoch is not over.
    """
    if not has_batch_norm(loop.model):
        return
    workers, run, seen = loop.workers, loop.run, 0
    with renewed_statistics(loop.model, workers):
        for batch in _backwards(run, images, starts, step, within):
            for positions in cut(loop.share(batch.size), run.micro_batch_size):
                loop.outputs(loop.model, batch, positions)
            seen += batch.size
            if seen >= min(STATISTICS_SAMPLES, len(images.order)):
                break


def _backwards(
    run: RunSpec, images: EpochImages, starts: range, step: int, beyond: bool
) -> Iterator[MiniBatch]:  # fmt: skip
    """The mini-batches trained on, the last one first: of an epoch and, with `beyond`, of the one before."""
    for back, start in enumerate(reversed(starts), start=1):
        yield MiniBatch(step - back, start, min(run.batch_size, len(images.order) - start), images)
    if beyond and (earlier := images.of_epoch_before()):
        yield from _backwards(run, earlier, minibatch_starts(len(images.order), run), step - len(starts), beyond=False)


@torch.no_grad()
def _evaluate_within(
    loop: Loop, data: ImageData, images: EpochImages, starts: range, step: int
) -> dict[str, float]:  # fmt: skip
    """Loss and accuracy in the midst of an epoch, of whose mini-batches these have been; training goes on as if nothing
    had happened."""
    trained = [parameter.clone() for parameter in loop.model.parameters()] if loop.averages else []
    with loop.evaluated():
        renew_statistics(loop, images, starts, step, within=True)
        found = _evaluations(loop.model, data, loop.run, within=True)
    if trained:  # optimizers that take their weights to an average and back do so up to rounding
        for parameter, value in zip(loop.model.parameters(), trained, strict=True):
            parameter.copy_(value)
    return found


def _evaluations(model: nn.Module, data: ImageData, run: RunSpec, within: bool = False) -> dict[str, Any]:
    """Loss and accuracy on what the run evaluates; within an epoch on no more than its target needs."""
    parts = {"val": data.validation}
    if (run.evaluate == "all" and not within) or (run.target and run.target.metric == "train_loss"):
        parts["clean_train"] = data.train
    if run.evaluate == "all" and not within:
        parts["test"] = data.test
    found = {}
    for name, images in parts.items():
        found[f"{name}_loss"], found[f"{name}_accuracy"] = evaluate(model, data, images, run.precision)
    return found


def _better(best: Best | None, epoch: int, val_accuracy: float, model: nn.Module, run: RunSpec) -> Best | None:
    """The best model so far on the validation split; the earlier one where two are equal."""
    if run.evaluate != "all" or run.train_on == "all" or (best and val_accuracy <= best["val_accuracy"]):
        return best
    return {"epoch": epoch, "val_accuracy": val_accuracy, "model": copy_of_state(model)}


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@exact_kernels()
@torch.no_grad()
def evaluate(model: nn.Module, data: ImageData, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Mean loss and accuracy on these images, without augmentation; every worker computes its share of the samples."""
    workers, dtype = Workers.current(), DTYPES[precision]
    training, layout = model.training, format_of(model)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)
    together = min(EVALUATION_BATCH, max(1, EVALUATION_BYTES // (4 * math.prod(data.shape))))
    for part in cut(worker_slice(len(images), workers.rank, workers.size), together):
        inputs, labels = data.plain(images, part, dtype, layout), images.labels[part]
        with autocast(precision, inputs.device):
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
