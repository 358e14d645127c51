"""Random directions in the space of a network's parameters, as a function of a seed and a spec.

A direction is drawn from a Gaussian and then scaled to the network's own weights (Li et al. 2018, "Visualizing the
loss landscape of neural nets", section 4): where batch norm follows, larger filters make the same function, and a step
of fixed length would make it look flatter. The Gaussian numbers depend on (seed, index, name of the parameter) alone:
all models of one architecture are looked at along the same draws, on any device, and a seed in a caption is the whole
direction.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lbstudy.parallel.randomness import stream
from lbstudy.study.run import Spec

Normalisation = Literal["filter", "layer", "none"]


class DirectionSpec(Spec):
    """All that is needed to draw a family of directions again."""

    seed: int = Field(0, ge=0)
    normalisation: Normalisation = Field(
        "filter", description="each filter (or layer) gets the norm of its weights; none: N(0, 1) in every entry"
    )
    biases_and_norms: bool = Field(
        False, description="also move biases and batch-norm parameters, which have one dimension; else zero there"
    )


@torch.no_grad()
def draw(model: nn.Module, spec: DirectionSpec, index: int) -> dict[str, Tensor]:
    """The direction of this index for a model: a tensor per parameter, by name, of its shape, type and device.

    A filter is an index of dimension 0: what feeds one output. A tensor of one dimension counts as a single filter; its
    direction is random as any other. (Taken entry by entry it would be plus or minus the parameter itself.)
    """
    return {
        name: _scaled(_gaussian(spec.seed, index, name, parameter), parameter, spec.normalisation)
        if parameter.ndim > 1 or spec.biases_and_norms
        else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }


def _gaussian(seed: int, index: int, name: str, parameter: Tensor) -> Tensor:
    # NumPy's numbers in double precision, so that neither device nor precision changes the draw.
    numbers = stream(seed, "direction", index, name).standard_normal(tuple(parameter.shape))
    return torch.as_tensor(numbers).to(parameter)


def _scaled(direction: Tensor, weights: Tensor, normalisation: Normalisation) -> Tensor:
    if normalisation == "none":
        return direction
    filters = direction.shape[0] if normalisation == "filter" and direction.ndim > 1 else 1
    scale = weights.reshape(filters, -1).norm(dim=1) / direction.reshape(filters, -1).norm(dim=1)
    return (direction.reshape(filters, -1) * scale[:, None]).view_as(direction)
