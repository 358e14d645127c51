"""The blocks of K-FAC's Fisher matrix: one per layer, for linear layers, convolutions and batch norm.

A block knows how to sum its statistics over samples, how to invert them, and how to apply the inverse to the
gradient of its parameters. Its running averages and inverses are kept by name in the optimizer's state of the
layer's weight. Parameters of no block take the plain gradient.

A layer may meet a sample several times: a convolution at each position, a linear layer at each token, any of them in
several places of the network. These R uses count as independent, which is K-FAC `expand` (Eschenhagen et al. 2023):
A sums over them and G averages, as for the positions of a convolution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lbstudy.methods.optimizers.kfac import factors
from lbstudy.parallel.batch_norm import BatchNorm

DampingForm = Literal["pi", "eigen"]


class KroneckerBlock:
    """A linear layer or convolution: Fisher block A (x) G, with weight and bias in one matrix of D_out x D_in.

    Damping `pi`: (A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I), inverted by Cholesky. Damping `eigen`:
    A (x) G + damping I, exactly, in the eigenvectors of A and G (Grosse et al. 2023, eq. 21).
    """

    statistics = ("input_factor", "gradient_factor")
    inverses = ("input_inverse", "gradient_inverse")

    def __init__(self, layer: nn.Linear | nn.Conv2d, name: str, damping_form: DampingForm):
        self.layer, self.name, self.damping_form = layer, name, damping_form
        parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        self.parameters = cast(list[nn.Parameter], parameters)
        self.weight = self.parameters[0]

    def input_sum(self, inputs: Tensor) -> Tensor:
        """Sum over samples of the products of the layer's inputs, N x ... x D or N x C x H x W: N A."""
        inputs = inputs.detach().to(self.weight.dtype)
        if isinstance(self.layer, nn.Linear):
            return factors.linear_input_sum(inputs.flatten(0, -2), self.layer.bias is not None)
        return factors.convolution_input_sum(inputs, self.layer)

    def gradient_sum(self, gradients: Tensor) -> Tensor:
        """Sum over samples of the products of the loss's gradients by the layer's outputs, over `averaged` of them."""
        gradients = gradients.to(self.weight.dtype)
        return factors.gradient_sum(gradients.flatten(0, -2) if isinstance(self.layer, nn.Linear) else gradients)

    def averaged(self, output: Tensor) -> int:
        """Positions of an output that `gradient_sum` averages over."""
        return 1 if isinstance(self.layer, nn.Linear) else math.prod(output.shape[2:])

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
    inverses = ("inverse",)

    def __init__(self, layer: BatchNorm, name: str):
        self.layer, self.name = layer, name
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


def blocks_of(
    model: nn.Module, damping_form: DampingForm, unitwise_batch_norm: bool
) -> tuple[list[Block], dict[str, str]]:
    """The blocks of a model, in the order of its modules, and the layers that have parameters but no block.

    No block have convolutions with groups or a padding other than zeros, layers that share parameters with another
    one or of which some are frozen, subclasses of linear layers and convolutions that compute something else, and all
    other kinds of layers. Frozen layers are in neither.

    Returns:
        The blocks; and of the other layers, by name (that of the model itself is empty), what kind they are, as in
        "Conv2d, groups=8". Batch norm is not among them where `unitwise_batch_norm` is false.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    blocks: list[Block] = []
    plain: dict[str, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        kind = type(module).__name__
        if not any(p.requires_grad for p in own.values()):
            continue
        if any(owners[id(p)] > 1 for p in own.values()):
            plain[name] = f"{kind}, shared parameters"
        elif isinstance(module, BatchNorm) and len(own) == 2:
            blocks += [UnitwiseBlock(module, name)] * unitwise_batch_norm
        elif not isinstance(module, nn.Linear | nn.Conv2d) or not _is_plainly_its_kind(module, own):
            plain[name] = kind
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            plain[name] = f"{kind}, groups={module.groups}"
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            plain[name] = f"{kind}, padding_mode={module.padding_mode!r}"
        else:
            blocks.append(KroneckerBlock(module, name, damping_form))
    return blocks, plain


def _is_plainly_its_kind(layer: nn.Linear | nn.Conv2d, own: dict[str, nn.Parameter]) -> bool:
    """Whether the layer computes what its kind does, with a weight and bias that are parameters and all trained."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # of attention, which takes its weight and never calls it
        return False
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    expected = {"weight"} if layer.bias is None else {"weight", "bias"}
    return type(layer).forward is kind.forward and {n for n, p in own.items() if p.requires_grad} == expected
