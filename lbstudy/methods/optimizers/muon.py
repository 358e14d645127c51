"""Muon, momentum orthogonalised by Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lbstudy.methods.optimizers import Optimizer, Recipe
from lbstudy.methods.optimizers.adam import adam_directions
from lbstudy.methods.optimizers.numbers import WeightDecay

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5: Jordan's, steepest at zero, for which singular values settle at 0.7 to 1.2."""

LEAST_NORM = 1e-7
"""Matrices of a smaller norm are nothing but rounding, and not blown up to a whole step; Jordan's and torch's value."""

EPSILON = 1e-8
"""Of the AdamW that moves what is not orthogonalised; torch's."""


class Numbers(WeightDecay):
    """Muon's hyper-parameters."""

    momentum: float = Field(0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(5, gt=0, description="of the orthogonalisation")
    rest_rate: float = Field(1.0, gt=0, description="learning rate of what AdamW moves, as a multiple of Muon's")
    rest_beta1: float = Field(0.9, ge=0, lt=1, description="beta1 of that AdamW")
    rest_beta2: float = Field(0.95, ge=0, lt=1, description="beta2 of that AdamW")


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov's momentum whose step is made orthogonal in every hidden weight; AdamW for the rest.

    v <- momentum v + (1 - momentum) g;  u = (1 - momentum) g + momentum v;
    w <- (1 - lr weight_decay) w - 0.2 sqrt(max(rows, columns)) lr NewtonSchulz(u).

    *Hidden weights* are the matrices of linear layers, convolutions (flattened to out x in kh kw) and attention,
    without the first and the last of them in the order of the modules, as Jordan advises: what reads the images and
    what gives the logits. Convolutions of one channel per group, and weights of one row or column, have nothing to be
    orthogonalised, and as in timm belong to the rest, with biases, norms, embeddings and free parameters.

    The factor 0.2 sqrt(max(rows, columns)) gives a step the root mean square of AdamW's (Liu et al. 2025, Muon is
    scalable for LLM training, section 2.2; `match_rms_adamw` in torch), so that one learning rate and one weight
    decay, of the size of AdamW's, serve both parts. Jordan's own factor is sqrt(max(1, rows / columns)).

    Newton-Schulz runs in the weight's precision. Workers need not communicate: they hold the same averaged gradient
    when a step is taken, and compute the same update.

    Args:
        model: the network; parameters without a gradient stay as they are.
        lr: learning rate.
        momentum: see above.
        weight_decay: decoupled.
        undecayed: parameters that weight decay leaves out.
        newton_schulz_steps: of the orthogonalisation.
        rest_rate: learning rate of the rest, as a multiple of `lr`. It is in the groups as `lr_scale`, for whoever
            sets their `lr` in the course of a run.
        rest_betas: weights of the past in the rest's averages of gradient and squared gradient; Jordan's are the
            default.

    Attributes:
        hidden_weights: names of the parameters that are orthogonalised.

    Raises:
        ValueError: the model has no hidden weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        undecayed: Collection[nn.Parameter] = (),
        newton_schulz_steps: int = 5,
        rest_rate: float = 1.0,
        rest_betas: tuple[float, float] = (0.9, 0.95),
    ):
        hidden = _hidden_weights(model)
        if not hidden:
            raise ValueError(
                f"Muon orthogonalises the weights between a model's first and last layer, but "
                f"{type(model).__name__} has none there"
            )
        self.hidden_weights = list(hidden)
        self._undecayed = {id(parameter) for parameter in undecayed}
        chosen = {id(parameter) for parameter in hidden.values()}
        super().__init__(
            [
                {
                    "params": list(hidden.values()), "lr": lr, "lr_scale": 1.0, "momentum": momentum,
                    "newton_schulz_steps": newton_schulz_steps,
                },
                {
                    "params": [p for p in model.parameters() if id(p) not in chosen], "lr": lr * rest_rate,
                    "lr_scale": rest_rate, "betas": rest_betas,
                },
            ],
            {"weight_decay": weight_decay},
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group, directions in zip(self.param_groups, (self._orthogonal, self._adam), strict=True):
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = directions(parameters, group)
            decayed = [p for p in parameters if id(p) not in self._undecayed] if group["weight_decay"] else []
            if decayed:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    def _orthogonal(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        """The orthogonalised steps of hidden weights, at a learning rate of 1."""
        for parameter in parameters:
            if "velocity" not in self.state[parameter]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        gradients = [cast(Tensor, p.grad) for p in parameters]
        velocities = [self.state[p]["velocity"] for p in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        updates = []
        for ahead in torch._foreach_lerp(gradients, velocities, group["momentum"]):
            matrix = ahead.flatten(1)
            matrix = orthogonalised(matrix, group["newton_schulz_steps"]).mul_(0.2 * max(matrix.shape) ** 0.5)
            updates.append(matrix.reshape(ahead.shape))
        return updates

    def _adam(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        return adam_directions(parameters, self.state, group["betas"], EPSILON)


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """U p(...p(S / ||S||)) V^T of a matrix U S V^T: nearly U V^T, by products of matrices alone.

    One step takes every singular value x to p(x) = a x + b x^3 + c x^5, since
    U p(S) V^T = a X + (b X X^T + c (X X^T)^2) X.

    Args:
        matrix: of any shape.
        steps: how often p is applied.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # so that X X^T is the smaller of the two products
    x = x / torch.linalg.matrix_norm(x).clamp(min=LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _hidden_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to orthogonalise, by name and in the order of the model."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | _ConvNd | nn.MultiheadAttention)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]  # which may share its matrix with a layer
    outer = {id(p) for m in [*layers[:1], *layers[-1:], *embeddings] for p in m.parameters(recurse=False)}
    hidden = {id(p) for m in layers for p in m.parameters(recurse=False) if p.ndim >= 2} - outer
    return {name: p for name, p in model.named_parameters() if id(p) in hidden and 1 not in p.shape[:2]}


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: Numbers = recipe.numbers
    return Muon(
        recipe.model,
        lr=recipe.learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        undecayed=recipe.undecayed,
        newton_schulz_steps=numbers.newton_schulz_steps,
        rest_rate=numbers.rest_rate,
        rest_betas=(numbers.rest_beta1, numbers.rest_beta2),
    )


METHOD = Optimizer(
    label="Muon", source="Jordan et al. 2024; the factor of its steps: Liu et al. 2025", numbers=Numbers, build=_build
)
