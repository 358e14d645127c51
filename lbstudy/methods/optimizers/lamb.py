"""LAMB, layer-wise adaptive moments (You et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lbstudy.methods.optimizers import Optimizer, Recipe
from lbstudy.methods.optimizers.adam import AdamNumbers, adam_directions
from lbstudy.methods.optimizers.numbers import TrustSettings


class Numbers(AdamNumbers):
    """LAMB's hyper-parameters: Adam's, with the paper's epsilon."""

    epsilon: float = Field(1e-6, gt=0, description="added to the root of the mean square")


class LAMB(torch.optim.Optimizer):
    """Adam whose step is scaled, per tensor, to the ratio of weight norm to step norm.

    r = m_hat / (sqrt(v_hat) + epsilon);  w <- w - lr ||w|| / ||r + wd w|| (r + wd w).
    What the paper leaves open, or its versions and implementations do differently: both moments are corrected for
    their zero start, as in the algorithm of the published version (the first one on arXiv, and several codes, leave
    that out); the decay is added to Adam's direction, not to the gradient, and is inside the ratio; phi(z) = z, no
    clipping of weight norms, ratios or gradients; and the ratio holds without weight decay too.
    Tensors of one dimension (biases, norms) take the plain rate, which makes them AdamW's, or with
    `trust_one_dimensional` theirs as in the paper, whose algorithm knows only layers. Tensors that are zero, and those
    whose direction and decay are zero, take the plain rate, since the ratio would keep them where they are.

    Args:
        params: the parameters; those without a gradient stay as they are.
        lr: learning rate.
        betas: weights of the past in the averages m of the gradient and v of its square; the paper's are the default.
        epsilon: see above; the paper's is the default.
        weight_decay: wd.
        trust_one_dimensional: see above.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        weight_decay: float = 0.0,
        trust_one_dimensional: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay})
        self._least_dimensions = 0 if trust_one_dimensional else 2  # of a tensor whose rate is scaled

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = adam_directions(parameters, self.state, group["betas"], group["epsilon"])
            if group["weight_decay"]:
                torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            self._scale(updates, parameters)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    def _scale(self, updates: list[Tensor], parameters: list[Tensor]) -> None:
        """Multiply updates by their trust ratios, which stay on the device."""
        chosen = [i for i, parameter in enumerate(parameters) if parameter.ndim >= self._least_dimensions]
        if not chosen:
            return
        scaled = [updates[i] for i in chosen]
        weight_norms = torch.stack(torch._foreach_norm([parameters[i] for i in chosen]))
        update_norms = torch.stack(torch._foreach_norm(scaled))
        usable = (weight_norms > 0) & (update_norms > 0)
        trust = torch.where(usable, weight_norms / update_norms, torch.ones_like(weight_norms))
        torch._foreach_mul_(scaled, list(trust.unbind()))


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: Numbers = recipe.numbers
    return LAMB(
        recipe.groups,
        lr=recipe.learning_rate,
        betas=(numbers.beta1, numbers.beta2),
        epsilon=numbers.epsilon,
        weight_decay=numbers.weight_decay,
        trust_one_dimensional=recipe.settings.one_dimensional == "trust",
    )


METHOD = Optimizer(label="LAMB", source="You et al. 2020", numbers=Numbers, settings=TrustSettings, build=_build)
