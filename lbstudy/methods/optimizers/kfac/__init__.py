"""K-FAC as an optimizer of a study. The optimizer itself is `optimizer.py`; beside it what it is made of."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from lbstudy.methods.optimizers import Optimizer, Recipe, velocity
from lbstudy.methods.optimizers.kfac.blocks import KroneckerBlock, blocks_of
from lbstudy.methods.optimizers.kfac.optimizer import KFAC
from lbstudy.methods.optimizers.numbers import NesterovMomentum
from lbstudy.study.run import Spec, check_milestones, milestones_passed

__all__ = ["KFAC", "METHOD"]


class Numbers(NesterovMomentum):
    """K-FAC's hyper-parameters."""

    damping: float = Field(3e-2, gt=0, description="added to the Fisher matrix")
    past_weight: float = Field(0.5, ge=0, lt=1, description="of the past in the averages of the statistics")
    factor_interval: int = Field(1, gt=0, description="steps between updates of the statistics")
    inverse_interval: int = Field(1, gt=0, description="steps between inversions, the dearer part")
    kl_clip: float | None = Field(None, gt=0, description="largest lr^2 <step, gradient>")


class Settings(Spec):
    """K-FAC (Martens & Grosse 2015) beyond its numbers."""

    fisher: Literal["empirical", "monte_carlo"] = Field(
        "empirical", description="with the labels, or with one drawn from each prediction (a second backward pass)"
    )
    damping_form: Literal["pi", "eigen"] = Field(
        "pi", description="pi: split over both factors, Cholesky; eigen: exact, by eigenvectors, far slower for VGG9"
    )
    batch_norm: Literal["unitwise", "plain"] = Field(
        "unitwise", description="unitwise: a 2 x 2 Fisher block per channel; plain: the gradient as it is"
    )
    weight_decay: Literal["plain", "preconditioned"] = Field(
        "plain", description="plain: as in SGD; preconditioned: an L2 term of the loss, its gradient preconditioned"
    )
    interval_milestones: list[int] = Field([], description="epochs (or steps), from 1, that make both intervals longer")
    interval_factor: int | None = Field(None, gt=1, description="by which each of the milestones multiplies them")

    @model_validator(mode="after")
    def _milestones_have_a_factor(self) -> Settings:
        check_milestones("interval_milestones", self.interval_milestones)
        if bool(self.interval_milestones) != (self.interval_factor is not None):
            raise ValueError("`interval_milestones` and `interval_factor` need each other")
        return self


def intervals(numbers: Numbers, settings: Settings, step: int, unit: int) -> dict[str, Any]:
    """Both intervals at optimizer step `step`, counted from 0; milestones count so many steps each."""
    growth = (settings.interval_factor or 1) ** milestones_passed(settings.interval_milestones, step, unit)
    return {
        "factor_interval": numbers.factor_interval * growth,
        "inverse_interval": numbers.inverse_interval * growth,
    }


def factor_numbers(model: nn.Module) -> list[int]:
    """How many numbers each tensor holds that K-FAC keeps of a model beside velocities, at most.

    These are A and G of each layer and their inverses (eigenvectors have eigenvalues as one more row), and of each
    batch-norm channel three numbers of its Fisher matrix and three of the inverse.
    """
    numbers = []
    for block in blocks_of(model, "eigen", unitwise_batch_norm=True)[0]:
        for statistic in block.statistics:
            rows, columns = block.zeros(statistic).shape
            numbers += [rows * columns, (rows + isinstance(block, KroneckerBlock)) * columns]
    return numbers


def _build(recipe: Recipe) -> torch.optim.Optimizer:
    numbers: Numbers = recipe.numbers
    settings: Settings = recipe.settings
    return KFAC(
        recipe.model,
        lr=recipe.learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        decay_in_gradient=settings.weight_decay == "preconditioned",
        undecayed=recipe.undecayed,
        nesterov=numbers.nesterov and numbers.momentum > 0,
        damping=numbers.damping,
        past_weight=numbers.past_weight,
        factor_interval=numbers.factor_interval,
        inverse_interval=numbers.inverse_interval,
        kl_clip=numbers.kl_clip,
        fisher=settings.fisher,
        damping_form=settings.damping_form,
        batch_norm=settings.batch_norm,
        seed=recipe.run.seed,
        compiled=recipe.run.compile,
    )


METHOD = Optimizer(
    label="K-FAC",
    source="Martens & Grosse 2015; convolutions: Grosse & Martens 2016; several workers: Osawa et al. 2019",
    numbers=Numbers,
    settings=Settings,
    build=_build,
    course=intervals,
    remembers=lambda model: velocity(model) + factor_numbers(model),
)
