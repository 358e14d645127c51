"""The blocks of K-FAC's Fisher matrix: one per layer, for linear layers, convolutions and batch norm.

A block knows how to sum its statistics over samples, how to invert them, and how to apply the inverse to the
gradient of its parameters. Its running averages and inverses are kept by name in the optimizer's state of the
layer's weight. Parameters of no block take the plain gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lbstudy.methods.optimizers.kfac import factors
from lbstudy.parallel.batch_norm import BatchNorm

DampingForm = Literal["pi", "eigen"]


class KroneckerBlock:
    """A linear layer or convolution: Fisher block A (x) G, with weight and bias in one matrix of D_out x D_in.

    Damping `pi`: (A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I), inverted by Cholesky. Damping `eigen`:
    A (x) G + damping I, exactly, in the eigenvectors of A and G (Grosse et al. 2023, eq. 21).
    """

    statistics = ("input_factor", "gradient_factor")

    def __init__(self, layer: nn.Linear | nn.Conv2d, name: str, damping_form: DampingForm):
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
            raise ValueError(
                f"K-FAC supports convolutions with groups=1 and padding_mode='zeros', but {name} has "
                f"groups={layer.groups} and padding_mode={layer.padding_mode!r}"
            )
        self.layer, self.damping_form = layer, damping_form
        parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        self.parameters = cast(list[nn.Parameter], parameters)
        self.weight = self.parameters[0]

    def input_sum(self, inputs: Tensor) -> Tensor:
        """Sum over samples of the products of the layer's inputs: N A."""
        inputs = inputs.detach().to(self.weight.dtype)
        if isinstance(self.layer, nn.Linear):
            return factors.linear_input_sum(inputs, self.layer.bias is not None)
        return factors.convolution_input_sum(inputs, self.layer)

    def gradient_sum(self, gradients: Tensor) -> Tensor:
        """Sum over samples of the products of the loss's gradients by the layer's outputs: N G."""
        return factors.gradient_sum(gradients.to(self.weight.dtype))

    def zeros(self, statistic: str) -> Tensor:
        """The statistic of no samples."""
        outputs = len(self.weight)
        order = outputs if statistic == "gradient_factor" else self._matrix(self.parameters).shape[1]
        return self.weight.new_zeros(order, order)

    def costs(self) -> Iterator[float]:
        """Arithmetic of the inversions of A and of G, in units of n^3."""
        for statistic in self.statistics:
            order = len(self.zeros(statistic)) if statistic == "input_factor" else len(self.weight)
            yield order**3 / (3 if order > factors.LARGE and self.damping_form == "pi" else 1)

    def precondition(self, gradients: list[Tensor], state: Mapping[str, Tensor], damping: float) -> list[Tensor]:
        """The inverse Fisher block times the gradients of `parameters`."""
        matrix = self._matrix(gradients)
        inputs, outputs = state["input_inverse"], state["gradient_inverse"]
        if self.damping_form == "pi":
            matrix = factors.apply_inverse(outputs, matrix)
            matrix = factors.apply_inverse(inputs, matrix.mT).mT
        else:
            eigenvalues = torch.outer(outputs[-1], inputs[-1]) + damping
            matrix = outputs[:-1] @ ((outputs[:-1].mT @ matrix @ inputs[:-1]) / eigenvalues) @ inputs[:-1].mT
        if len(gradients) == 1:
            return [matrix.view_as(self.weight)]
        return [matrix[:, :-1].reshape(self.weight.shape), matrix[:, -1]]

    def _matrix(self, tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
        weight = tensors[0].flatten(1)
        return weight if len(tensors) == 1 else torch.cat([weight, tensors[1][:, None]], dim=1)


class UnitwiseBlock:
    """Batch norm: for each channel the 2 x 2 Fisher matrix of its weight and bias (Osawa et al. 2020, SP-NGD).

    It is the mean over samples of the products of each sample's gradients, plus damping I. A sample's gradients are
    those that pass through its own rows of the output; the batch statistics themselves are held constant here.
    """

    statistics = ("fisher",)

    def __init__(self, layer: BatchNorm):
        self.layer = layer
        self.parameters = cast(list[nn.Parameter], [layer.weight, layer.bias])
        self.weight = self.parameters[0]

    def fisher_sum(self, normalised: Tensor, gradients: Tensor) -> Tensor:
        """Sum over samples of the products (weight weight, weight bias, bias bias) of each channel, 3 x C."""
        gradients, normalised = (t.detach().to(self.weight.dtype) for t in (gradients, normalised))
        weight, bias = gradients * normalised, gradients
        if gradients.ndim > 2:
            weight, bias = weight.flatten(2).sum(2), bias.flatten(2).sum(2)
        return torch.stack([(weight * weight).sum(0), (weight * bias).sum(0), (bias * bias).sum(0)])

    def zeros(self, statistic: str) -> Tensor:
        """The statistic of no samples."""
        return self.weight.new_zeros(3, len(self.weight))

    def inverse(self, fisher: Tensor, damping: float) -> Tensor:
        """The inverses of the damped 2 x 2 matrices, 3 x C."""
        first, mixed, last = fisher.double()
        first, last = first + damping, last + damping
        return (torch.stack([last, -mixed, first]) / (first * last - mixed**2)).to(fisher.dtype)

    def precondition(self, gradients: list[Tensor], state: Mapping[str, Tensor], damping: float) -> list[Tensor]:
        """The inverse Fisher block times the gradients of weight and bias."""
        first, mixed, last = state["inverse"]
        weight, bias = gradients
        return [first * weight + mixed * bias, mixed * weight + last * bias]


Block = KroneckerBlock | UnitwiseBlock


def blocks_of(model: nn.Module, damping_form: DampingForm, unitwise_batch_norm: bool) -> list[Block]:
    """The blocks of a model, in the order of its modules.

    Raises:
        ValueError: a convolution is of a kind that K-FAC does not support.
    """
    blocks: list[Block] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            blocks.append(KroneckerBlock(module, name, damping_form))
        elif isinstance(module, BatchNorm) and unitwise_batch_norm and _has_both(module):
            blocks.append(UnitwiseBlock(module))
    return blocks


def _has_both(layer: BatchNorm) -> bool:
    return layer.weight is not None and layer.bias is not None
