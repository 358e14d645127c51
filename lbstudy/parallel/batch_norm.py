"""Batch norm whose statistics do not depend on the number of workers, nor on how often the weights were updated.

`sync`: statistics of the global mini-batch. `ghost: N`: statistics of consecutive ghost batches of N samples
(Hoffer et al. 2017, algorithm 1), which no worker's slice tears apart. The layers are torch's own in every other
respect: same parameters, same buffers, same evaluation.

Training leaves the running statistics alone: they are computed afresh, by `renewed_statistics`, before every
evaluation ("precise" batch norm, Wu & Johnson 2021). The usual moving average, a tenth per *step*, forgets too slowly
where an epoch has few steps, so that large mini-batches would be evaluated with statistics of weights long gone; and
with parameter noise it would hold those of perturbed weights. Both would be taken for a generalisation gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.parallel.workers import Workers


class Moments(NamedTuple):
    """What a layer saw of one (ghost) batch."""

    mean: Tensor  # C
    inverse_std: Tensor  # C, with the layer's eps
    values: int | Tensor  # per channel


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over dimension 1 of N x C or N x C x H x W.

    Args:
        features: channels C.
        ghost: samples of a ghost batch; None for the statistics of the global mini-batch.
        eps: added to the variance.
        affine: whether it has weight and bias.
    """

    def __init__(self, features: int, ghost: int | None = None, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(features, eps=eps, affine=affine)
        self.ghost = ghost
        self._latest: list[Moments] = []  # of the latest training pass
        self._kept: list[Moments] | None = None  # of all passes within `renewed_statistics`

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected N x {self.num_features} x ..., but got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the batch's statistics while training, with the running ones in evaluation.

        Raises:
            ValueError: a batch has a single value per channel, which has no variance.
        """
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        running = cast(Tensor, self.running_mean)
        kind, x = input.dtype, input.to(running.dtype)  # bf16 activations, fp32 statistics
        weight = torch.ones_like(running) if self.weight is None else self.weight
        bias = torch.zeros_like(running) if self.bias is None else self.bias
        workers = Workers.current()
        if self.ghost is None and workers.size > 1:
            out, *moments = _SyncBatchNorm.apply(x, weight, bias, self.eps, workers)
            self._keep([Moments(*moments)])
            return out.to(kind)
        if not len(x):  # a worker without samples takes part with zero gradients
            self._keep([])
            return (x * weight.sum() + bias.sum()).to(kind)
        parts, seen = [], []
        for part in x.split(self.ghost or len(x)):
            count = part.numel() // self.num_features
            if count < 2:
                raise ValueError("batch norm needs at least two values per channel, but a batch has one sample")
            out, mean, inverse_std = torch.native_batch_norm(part, weight, bias, None, None, True, 0, self.eps)
            parts.append(out)
            seen.append(Moments(mean.detach(), inverse_std.detach(), count))
        self._keep(seen)
        return torch.cat(parts).to(kind) if len(parts) > 1 else parts[0].to(kind)

    @torch.no_grad()
    def normalised(self, input: Tensor) -> Tensor:
        """The input of the latest training pass as it was normalised there, before weight and bias."""
        if not len(input):
            return input
        view = [1, -1] + [1] * (input.ndim - 2)
        parts = input.split(self.ghost or len(input))
        return torch.cat(
            [
                (part - seen.mean.view(view)) * seen.inverse_std.view(view)
                for part, seen in zip(parts, self._latest, strict=True)
            ]
        )

    def _keep(self, seen: list[Moments]) -> None:
        self._latest = seen
        if self._kept is not None:
            self._kept += seen

    def _kept_sums(self) -> Tensor:
        """Sums over the kept batches, weighted by count, of mean and unbiased variance; and of the counts: 2C + 1."""
        sums = cast(Tensor, self.running_mean).new_zeros(2 * self.num_features + 1)
        means, variances, counts = sums.split([self.num_features, self.num_features, 1])
        for mean, inverse_std, count in self._kept or []:
            variance = (inverse_std.pow(-2) - self.eps).clamp(min=0)
            means += mean * count
            variances += variance * (count / (count - 1)) * count
            counts += count
        return sums


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer of the model has running statistics of ours."""
    return any(isinstance(module, BatchNorm) for module in model.modules())


@contextmanager
def renewed_statistics(model: nn.Module, workers: Workers) -> Iterator[None]:
    """The training passes within this block make the model's running statistics, afresh: nothing of before is left.

    Running mean and variance become the averages over the block's (ghost) batches of all workers, weighted by their
    size. Every worker must take part. Run the passes without gradients, with the weights that will be evaluated.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for layer in layers:
        layer._kept = []
    try:
        yield
        with torch.no_grad():
            sums = [layer._kept_sums() for layer in layers]
            totals = workers.sum(torch.cat(sums)).split([len(part) for part in sums])
            for layer, total in zip(layers, totals, strict=True):
                mean, variance = total[:-1].div(total[-1]).split(layer.num_features)
                layer.running_mean.copy_(mean)  # type: ignore[union-attr]
                layer.running_var.copy_(variance)  # type: ignore[union-attr]
    finally:
        for layer in layers:
            layer._kept = None


class _SyncBatchNorm(torch.autograd.Function):
    """Batch norm over the samples of all workers. torch's SyncBatchNorm has no CPU kernel, hence our own.

    Backward, with xhat the normalised input and averages <> over all N samples of all workers:
    dx = weight / std * (dy - <dy> - xhat <dy xhat>). Gradients of weight and bias are local sums; the gradient
    all-reduce adds them up like any other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, workers: Workers) -> Any:
        dims = [0, *range(2, x.ndim)]
        view = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_full((1,), x.numel() // x.shape[1])
        if len(x):
            variance, mean = torch.var_mean(x, dim=dims, correction=0)
        else:
            variance = mean = x.new_zeros(x.shape[1])
        counts, means, variances = workers.gather(torch.cat([count, mean, variance])).split(
            [1, len(mean), len(mean)], 1
        )
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total  # Chan et al. 1983, parallel variance
        inverse_std = (variance + eps).rsqrt()
        normalised = (x - mean.view(view)) * inverse_std.view(view)
        ctx.save_for_backward(normalised, weight, inverse_std, total)
        ctx.workers, ctx.dims, ctx.view = workers, dims, view
        ctx.mark_non_differentiable(mean, inverse_std, total)
        return normalised * weight.view(view) + bias.view(view), mean, inverse_std, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        normalised, weight, inverse_std, total = ctx.saved_tensors
        sums = torch.cat([grad.sum(ctx.dims), (grad * normalised).sum(ctx.dims)])
        grad_bias, grad_weight = sums.clone().chunk(2)
        mean_grad, mean_product = (ctx.workers.sum(sums) / total).chunk(2)
        inner = grad - mean_grad.view(ctx.view) - normalised * mean_product.view(ctx.view)
        return inner * (weight * inverse_std).view(ctx.view), grad_weight, grad_bias, None, None
