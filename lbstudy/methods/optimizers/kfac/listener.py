"""The hooks by which K-FAC sees the inputs of its layers and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lbstudy.methods.optimizers.kfac.blocks import Block, KroneckerBlock, UnitwiseBlock

Statistic = tuple[Block, str]


class Listener:
    """The hooks of one pass: they add the statistics of its samples to `sums`.

    Args:
        sums: of the step's passes so far.
        samples: of this pass.
        sample_weight: of one sample in the statistics.
        gradient_weight: restores g g^T of samples, whose loss is weighted; None: this backward pass is not for us.
    """

    def __init__(
        self, sums: dict[Statistic, Tensor], samples: int, sample_weight: float, gradient_weight: float | None
    ):
        self._sums, self._samples, self._sample_weight = sums, samples, sample_weight
        self._uses: dict[Block, float] = {}  # R of a layer: outputs per sample, over all its calls
        self.gradient_weight = gradient_weight

    def hook(self, block: Block) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """The forward hook of a block's layer; it puts one on the output, which goes with the graph."""

        def after_layer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            if isinstance(block, KroneckerBlock):
                self._add(block, "input_factor", 1.0, block.input_sum, inputs[0])
                uses = output.numel() / (len(block.weight) * max(self._samples, 1))
                self._uses[block] = self._uses.get(block, 0.0) + uses
                averaged = block.averaged(output)
                output.register_hook(lambda g: self._add_gradient_factor(block, averaged, g))
            else:
                normalised = block.layer.normalised(inputs[0])
                output.register_hook(lambda g: self._add_fisher(block, normalised, g))

        return after_layer

    def _add_gradient_factor(self, block: KroneckerBlock, averaged: int, gradients: Tensor) -> None:
        if self.gradient_weight is not None:
            share = averaged / (self._uses[block] or 1.0)  # no uses: a worker without samples
            self._add(block, "gradient_factor", self.gradient_weight * share, block.gradient_sum, gradients)

    def _add_fisher(self, block: UnitwiseBlock, normalised: Tensor, gradients: Tensor) -> None:
        if self.gradient_weight is not None:
            self._add(block, "fisher", self.gradient_weight, block.fisher_sum, normalised, gradients)

    @torch.no_grad()
    def _add(self, block: Block, name: str, weight: float, sums: Callable[..., Tensor], *arguments: Tensor) -> None:
        with torch.autocast(arguments[0].device.type, enabled=False):
            total = sums(*arguments).mul_(weight * self._sample_weight)
        key = (block, name)
        if key in self._sums:
            self._sums[key] += total
        else:
            self._sums[key] = total
