"""LARS, layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field

from lbstudy.methods.optimizers import Optimizer, Recipe, velocity
from lbstudy.methods.optimizers.numbers import Momentum, TrustSettings


class Numbers(Momentum):
    """LARS' hyper-parameters."""

    trust_coefficient: float = Field(1e-3, gt=0, description="eta in You et al. 2017")


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate is scaled, per tensor, to the ratio of weight norm to gradient norm.

    trust = eta ||w|| / (||g|| + wd ||w||);  v <- momentum v + lr trust (g + wd w);  w <- w - v.
    Tensors of one dimension (biases, batch norm) take the plain rate, as has become usual, or with
    `trust_one_dimensional` theirs as in the paper, whose algorithm knows only layers. Zero tensors, and those whose
    gradient and decay are zero, take the plain rate, since the ratio would keep them where they are.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        trust_one_dimensional: bool = False,
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )
        self._least_dimensions = 0 if trust_one_dimensional else 2  # of a tensor whose rate is scaled

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim >= self._least_dimensions:
                    weight_norm, gradient_norm = parameter.norm(), parameter.grad.norm()
                    denominator = gradient_norm + group["weight_decay"] * weight_norm
                    trust = group["trust_coefficient"] * weight_norm / denominator
                    usable = (weight_norm > 0) & (denominator > 0)
                    update.mul_(torch.where(usable, trust, torch.ones_like(trust)))
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                parameter.sub_(state["velocity"])
        return loss


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: Numbers = recipe.numbers
    return LARS(
        recipe.groups,
        lr=recipe.learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        trust_coefficient=numbers.trust_coefficient,
        trust_one_dimensional=recipe.settings.one_dimensional == "trust",
    )


METHOD = Optimizer(
    label="LARS",
    source="You, Gitman & Ginsburg 2017",
    numbers=Numbers,
    settings=TrustSettings,
    build=_build,
    remembers=velocity,
)
