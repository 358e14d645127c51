"""The direction of Adam (Kingma & Ba 2015, algorithm 1), which LAMB scales and Muon takes where it is not Muon."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from lbstudy.methods.optimizers.numbers import WeightDecay


class AdamNumbers(WeightDecay):
    """What Adam and its relatives have."""

    beta1: float = Field(0.9, ge=0, lt=1, description="of the past in the mean of the gradient")
    beta2: float = Field(0.999, ge=0, lt=1, description="of the past in the mean of its square")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean square")


def adam_directions(
    parameters: list[nn.Parameter],
    states: MutableMapping[Any, dict[str, Any]],
    betas: tuple[float, float],
    epsilon: float,
) -> list[Tensor]:
    """Take the gradients into the moments, and give m_hat / (sqrt(v_hat) + epsilon) of every parameter.

    m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, both from zero; m_hat = m / (1 - beta1^t) and
    v_hat = v / (1 - beta2^t) undo the zeros. As in torch, t counts the steps in which the parameter had a gradient.

    Args:
        parameters: all with a gradient.
        states: the optimizer's; `first_moment`, `second_moment` and `step` of each parameter are kept there.
        betas: beta1 and beta2.
        epsilon: see above.
    """
    if not parameters:
        return []
    for parameter in parameters:
        state = states[parameter]
        if "step" not in state:
            state["first_moment"], state["second_moment"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = 0
        state["step"] += 1
    gradients = [cast(Tensor, p.grad) for p in parameters]
    first, second = ([states[p][name] for p in parameters] for name in ("first_moment", "second_moment"))
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - betas[1])
    steps = [states[p]["step"] for p in parameters]
    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, [(1 - betas[1] ** step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, epsilon)
    directions = torch._foreach_div(first, denominators)
    torch._foreach_div_(directions, [1 - betas[0] ** step for step in steps])
    return list(directions)
