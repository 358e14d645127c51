"""AdamW, Adam with decoupled weight decay (Loshchilov & Hutter 2019): torch's."""

from __future__ import annotations

import torch

from lbstudy.methods.optimizers import Optimizer, Recipe
from lbstudy.methods.optimizers.adam import AdamNumbers


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: AdamNumbers = recipe.numbers
    return torch.optim.AdamW(
        recipe.groups,
        lr=recipe.learning_rate,
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
        fused=recipe.fused,
        foreach=not recipe.fused,  # the bits of one tensor after the other, in two thirds of the time
    )


METHOD = Optimizer(label="AdamW", source="Loshchilov & Hutter 2019", numbers=AdamNumbers, build=_build)
