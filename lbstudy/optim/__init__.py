"""The optimizers of a study, by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lbstudy.optim.lars import LARS
from lbstudy.runspec import RunSpec


def build(run: RunSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The run's optimizer. Weight decay applies to all parameters, batch norm and biases included, as in the sources.

    Its learning rate is a placeholder: `train()` sets it before each step.
    """
    hyper = run.hyper
    rate = hyper.learning_rate
    assert rate is not None
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            nesterov=run.nesterov and hyper.momentum > 0,
        )
    if run.optimizer == "lars":
        return LARS(
            parameters,
            lr=rate,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            trust_coefficient=hyper.trust_coefficient,
        )
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=hyper.weight_decay)
    raise ValueError(f"no optimizer called {run.optimizer!r} in this version")
