"""The gradient noise scale B_simple = tr(Sigma) / |G|^2 (McCandlish et al., arXiv 1812.06162, section 2.2).

G is the gradient of the loss as trained, and Sigma a single sample's covariance around it: a mini-batch of B has the
variance tr(Sigma) / B, so that at B = B_simple noise and signal are equally large. Both are estimated without bias from
the gradients g_1 ... g_K of mini-batches that share no sample, by their products g_k . g_l alone:

    tr(Sigma) / B = sum_k |g_k - mean|^2 / (K - 1),    |G|^2 = |mean|^2 - (1 - K B / N) tr(Sigma) / (K B).

1 - K B / N is the correction for samples drawn without replacement from all N there are; it is 1 where augmentation or
smoothing draws something anew each time. The gradients go through the training loop's own places, so that mixing,
parameter noise, SAM's ascent, ghost batches and augmentation are what they are in training. Errors are the jackknife's
over mini-batches.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lbstudy.study.run import RunSpec, Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lbstudy.training.data import ImageData

LEAST_BATCHES = 4
"""Mini-batches that a variance takes; a batch size that the training set has fewer of is left out."""


class NoiseSpec(Spec):
    """How to measure; the same for every model that is compared."""

    samples: int = Field(4096, gt=0, description="training samples whose gradients are taken, at each batch size")
    batch_sizes: tuple[int, ...] = Field((64, 128, 256), description="of mini-batches; the first has the least error")


class Noise(NamedTuple):
    """What mini-batches of one size say; errors are standard errors."""

    smoothed: bool  # with the run's smoothing in force
    batch_size: int
    batches: int
    trace: float  # tr(Sigma): the variance of a mini-batch's gradient, times its size
    trace_error: float
    squared_norm: float  # |G|^2, without bias, so that it may be negative
    squared_norm_error: float
    scale: float  # infinite where |G|^2 is not positive
    scale_error: float


def estimate(products: NDArray[np.float64], batch_size: int, population: float = inf) -> dict[str, float]:
    """tr(Sigma), |G|^2 and their ratio, with jackknife errors.

    Args:
        products: g_k . g_l of K mini-batches without a sample in common, K x K.
        batch_size: B.
        population: samples that they were drawn from; infinite if not without replacement.
    """
    count, own = len(products), np.diag(products)
    total, trace = products.sum(), own.sum()

    def found(k: float, total: NDArray[np.float64], trace: NDArray[np.float64]) -> NDArray[np.float64]:
        variance = (trace - total / k) / (k - 1)
        squared = total / k**2 - (1 - k * batch_size / population) * variance / k
        scale = np.where(squared > 0, batch_size * variance / np.where(squared > 0, squared, 1), inf)
        return np.stack([batch_size * variance, squared, scale])

    values = found(count, total, trace)
    without = found(count - 1, total - 2 * products.sum(axis=1) + own, trace - own)
    with np.errstate(invalid="ignore"):  # without some mini-batch the scale may be infinite, and has no error then
        deviations = without - without.mean(axis=1, keepdims=True)
        errors = np.sqrt((count - 1) / count * np.square(deviations).sum(axis=1))
    names = ("trace", "squared_norm", "scale")
    return {n: float(v) for n, v in zip(names, values, strict=True)} | {
        f"{n}_error": float(e) for n, e in zip(names, errors, strict=True)
    }


def measure(model: nn.Module, run: RunSpec, data: ImageData, epoch: int, spec: NoiseSpec) -> list[Noise]:
    """The noise of the gradient at a model, by batch size, with the run's smoothing and without.

    Args:
        model: on the device of the images; its gradients are lost, and it is in training mode afterwards.
        run: that it is of.
        data: the run's.
        epoch: after which the run had it: the mini-batches are those of an epoch that would follow.
        spec: what to do.
    """
    found = []
    for smoothed in (False, True) if run.smoothing != "none" else (False,):
        here = run.model_copy(update={"compile": False} | ({} if smoothed else {"smoothing": "none"}))
        repeatable = not smoothed and not run.dataset.augment
        for batch_size in spec.batch_sizes:
            batches = min(spec.samples, len(data.train)) // batch_size
            if batches >= LEAST_BATCHES:
                gradients = mini_batch_gradients(model, here, data, epoch, batch_size, batches)
                products = (gradients @ gradients.T).cpu().numpy().astype(np.float64)
                values = estimate(products, batch_size, len(data.train) if repeatable else inf)
                found.append(Noise(smoothed, batch_size, batches, **values))
    return found


def mini_batch_gradients(
    model: nn.Module, run: RunSpec, data: ImageData, epoch: int, batch_size: int, batches: int
) -> Tensor:
    """The gradients of the first so many mini-batches of an epoch, none of which makes a step: batches x parameters."""
    import torch

    from lbstudy.training.data import EpochImages
    from lbstudy.training.loop import DTYPES, Loop, MiniBatch

    per_epoch = -(-len(data.train) // run.batch_size)
    loop = Loop.of(run.model_copy(update={"batch_size": batch_size}), model.train(), per_epoch)
    images = EpochImages(data, run.dataset, run.seed, epoch + 1, DTYPES[run.precision])
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for place in range(batches):
        batch = MiniBatch(epoch * per_epoch + place, place * batch_size, batch_size, images)
        model.zero_grad(set_to_none=True)
        for passes in loop.forward_passes(batch_size):
            with loop.smoothing.ascended(batch.step, partial(loop.ascent, batch, passes)):
                loop.gradient(batch, passes, ascent=True)  # so that the optimizer does not look
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(gradients)
