"""The optimizers of a study, by name."""

from __future__ import annotations

import torch
from torch import nn

from lbstudy.methods.optimizers.kfac import KFAC
from lbstudy.methods.optimizers.lars import LARS
from lbstudy.study.run import RunSpec

__all__ = ["KFAC", "LARS", "build", "set_course"]


def build(run: RunSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The run's optimizer. Weight decay applies to all parameters, batch norm and biases included, as in the sources.

    What changes in the course of the run, `set_course` sets before each step.
    """
    hyper, parameters = run.hyper, model.parameters()
    rate = hyper.learning_rate
    assert rate is not None
    nesterov = run.nesterov and hyper.momentum > 0
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            nesterov=nesterov,
        )
    if run.optimizer == "lars":
        return LARS(
            parameters,
            lr=rate,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            trust_coefficient=hyper.trust_coefficient,
            trust_one_dimensional=run.lars.one_dimensional == "trust",
        )
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=hyper.weight_decay)
    return KFAC(
        model,
        lr=rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
        decay_in_gradient=run.kfac.weight_decay == "preconditioned",
        nesterov=nesterov,
        damping=hyper.damping,
        past_weight=hyper.past_weight,
        factor_interval=hyper.factor_interval,
        inverse_interval=hyper.inverse_interval,
        kl_clip=hyper.kl_clip,
        fisher=run.kfac.fisher,
        damping_form=run.kfac.damping_form,
        batch_norm=run.kfac.batch_norm,
        seed=run.seed,
        compiled=run.compile,
    )


def set_course(optimizer: torch.optim.Optimizer, run: RunSpec, step: int, steps_per_epoch: int) -> float:
    """Set what changes in the course of a run: the learning rate, which is returned, and the intervals of K-FAC.

    Args:
        optimizer: as `build` made it.
        run: the run.
        step: optimizer steps before this one.
        steps_per_epoch: of the run.
    """
    assert run.hyper.learning_rate is not None
    rate = run.hyper.learning_rate * run.schedule.rate_factor(step, run.budget, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, KFAC):
        growth = run.kfac.interval_growth(step, run.budget.unit(steps_per_epoch))
        for name in ("factor_interval", "inverse_interval"):
            optimizer.param_groups[0][name] = getattr(run.hyper, name) * growth
    return rate
