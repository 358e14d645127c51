"""Batch norm whose statistics do not depend on the number of workers.

`sync`: statistics of the global mini-batch. `ghost: N`: statistics of consecutive ghost batches of N samples
(Hoffer et al. 2017, algorithm 1), which no worker's slice tears apart. The layers are torch's own in every other
respect: same parameters, same buffers, same evaluation.

Running statistics change once per optimizer step, in `commit_statistics`, however many forward passes the step
took: by the average over all of the step's batches, weighted by their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.workers import Workers


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over dimension 1 of N x C or N x C x H x W.

    Args:
        features: channels C.
        ghost: samples of a ghost batch; None for the statistics of the global mini-batch.
    """

    def __init__(self, features: int, ghost: int | None = None):
        super().__init__(features)
        self.ghost = ghost
        self._pending: list[Tensor] = []  # per forward pass: weighted mean, weighted variance, weight; 2C + 1

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected N x {self.num_features} x ..., but got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the batch's statistics while training, with the running ones in evaluation."""
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        kind, x = input.dtype, input.to(self.weight.dtype)  # bf16 activations, fp32 statistics
        workers = Workers.current()
        if self.ghost is None and workers.size > 1:
            out, mean, variance, count = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps, workers)
            self._keep(mean, variance, count)
            return out.to(kind)
        if not len(x):  # a worker without samples takes part with zero gradients
            return (x * self.weight.sum() + self.bias.sum()).to(kind)
        parts = []
        for part in x.split(self.ghost or len(x)):
            out, mean, inverse_std = torch.native_batch_norm(
                part, self.weight, self.bias, None, None, True, 0, self.eps
            )
            parts.append(out)
            count = torch.tensor(part.numel() // self.num_features, dtype=x.dtype, device=x.device)
            self._keep(mean, (inverse_std.pow(-2) - self.eps).clamp(min=0), count)
        return torch.cat(parts).to(kind) if len(parts) > 1 else parts[0].to(kind)

    @torch.no_grad()
    def normalised(self, input: Tensor) -> Tensor:
        """The input of the latest training pass as it was normalised there, before weight and bias."""
        if not len(input):
            return input
        view = [1, -1] + [1] * (input.ndim - 2)
        parts = input.split(self.ghost or len(input))
        normalised = []
        for part, kept in zip(parts, self._pending[-len(parts) :], strict=True):
            mean, unbiased = (kept[:-1] / kept[-1]).chunk(2)
            variance = unbiased * ((kept[-1] - 1).clamp(min=1) / kept[-1])
            normalised.append((part - mean.view(view)) * (variance + self.eps).rsqrt().view(view))
        return torch.cat(normalised)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self._pending.append(torch.cat([mean.detach() * count, unbiased.detach() * count, count.detach().view(1)]))


@torch.no_grad()
def commit_statistics(model: nn.Module, workers: Workers) -> None:
    """Update all running statistics with what the forward passes of this optimizer step saw."""
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if not layers:
        return
    sums = [
        torch.stack(layer._pending).sum(0) if layer._pending else layer.weight.new_zeros(2 * layer.num_features + 1)
        for layer in layers
    ]
    totals = workers.sum(torch.cat(sums)).split([len(s) for s in sums])
    for layer, total in zip(layers, totals, strict=True):
        layer._pending.clear()
        mean, variance = total[:-1].div(total[-1]).split(layer.num_features)
        layer.running_mean.lerp_(mean, layer.momentum)  # type: ignore[union-attr, arg-type]
        layer.running_var.lerp_(variance, layer.momentum)  # type: ignore[union-attr, arg-type]
        layer.num_batches_tracked.add_(1)  # type: ignore[union-attr]


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
        count = x.new_tensor([x.numel() // x.shape[1]])
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
        ctx.mark_non_differentiable(mean, variance, total)
        return normalised * weight.view(view) + bias.view(view), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        normalised, weight, inverse_std, total = ctx.saved_tensors
        sums = torch.cat([grad.sum(ctx.dims), (grad * normalised).sum(ctx.dims)])
        grad_bias, grad_weight = sums.clone().chunk(2)
        mean_grad, mean_product = (ctx.workers.sum(sums) / total).chunk(2)
        inner = grad - mean_grad.view(ctx.view) - normalised * mean_product.view(ctx.view)
        return inner * (weight * inverse_std).view(ctx.view), grad_weight, grad_bias, None, None
