"""LARS, layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

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
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "velocity" not in self.state[parameter]:
                    self.state[parameter]["velocity"] = torch.zeros_like(parameter)
            velocities = [self.state[p]["velocity"] for p in parameters]
            gradients = [cast(Tensor, p.grad) for p in parameters]
            updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            self._scale(updates, parameters, gradients, group)
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates, alpha=group["lr"])
            torch._foreach_sub_(parameters, velocities)
        return loss

    def _scale(
        self, updates: list[Tensor], parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        """Multiply updates by their trust ratios, which stay on the device."""
        chosen = [i for i, parameter in enumerate(parameters) if parameter.ndim >= self._least_dimensions]
        if not chosen:
            return
        weight_norms = torch.stack(torch._foreach_norm([parameters[i] for i in chosen]))
        gradient_norms = torch.stack(torch._foreach_norm([gradients[i] for i in chosen]))
        denominators = gradient_norms + group["weight_decay"] * weight_norms
        trust = group["trust_coefficient"] * weight_norms / denominators
        usable = (weight_norms > 0) & (denominators > 0)
        trust = torch.where(usable, trust, torch.ones_like(trust))
        torch._foreach_mul_([updates[i] for i in chosen], list(trust.unbind()))


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
