"""SGD with heavy-ball or Nesterov's momentum: torch's."""

from __future__ import annotations

import torch

from lbstudy.methods.optimizers import Optimizer, Recipe, velocity
from lbstudy.methods.optimizers.numbers import NesterovMomentum


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: NesterovMomentum = recipe.numbers
    return torch.optim.SGD(
        recipe.groups,
        lr=recipe.learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        nesterov=numbers.nesterov and numbers.momentum > 0,
        fused=recipe.fused or None,
    )


METHOD = Optimizer(
    label="SGD",
    source="Robbins & Monro 1951; momentum: Polyak 1964, Nesterov 1983",
    numbers=NesterovMomentum,
    build=_build,
    remembers=velocity,
)
