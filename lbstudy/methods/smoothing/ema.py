"""Exponential moving average of the weights (Polyak & Juditsky 1992, as in Szegedy et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lbstudy.methods.smoothing import Smoothing
from lbstudy.study.run import Spec


class Numbers(Spec):
    """The average's hyper-parameter."""

    ema_decay: float = Field(gt=0, lt=1, description="of the past in the average of the weights, each step")


class ExponentialMovingAverage(Smoothing):
    """The weights that are evaluated and kept are averages over the steps; the training does not know of them.

    average <- decay average + (1 - decay) w after every step, of every parameter. The average begins as a copy of the
    weights after the first step, as in torch's `AveragedModel`: there is no bias to correct, and the initial weights
    are not in it. Averaged weights have no statistics of their own: before each evaluation the training loop computes
    batch norm's afresh at the averages.
    """

    label = "averaged weights"
    source = "Polyak & Juditsky 1992; Szegedy et al. 2016"
    Numbers = Numbers

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        super().__init__(model, numbers, settings, seed)
        self._parameters = [parameter.detach() for parameter in model.parameters()]  # they share the storage
        self._averages: list[Tensor] = []  # of each parameter; none before the first step
        self._update = get_ema_multi_avg_fn(numbers.ema_decay)

    def after_step(self, step: int) -> None:
        """Take the new weights into the averages."""
        if self._averages:
            self._update(self._averages, self._parameters, step)
        else:
            self._averages = [parameter.clone() for parameter in self._parameters]

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the parameters are the averages; afterwards they are what they were, to the bit."""
        return self._within()

    @contextmanager
    def _within(self) -> Iterator[None]:
        trained = [parameter.clone() for parameter in self._parameters]
        if self._averages:
            torch._foreach_copy_(self._parameters, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, trained)

    def state_dict(self) -> dict[str, Any]:
        """The averages, in the order of the model's parameters."""
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these averages."""
        pairs = zip(state["averages"], self._parameters, strict=True) if state["averages"] else ()
        self._averages = [average.to(parameter.device).clone() for average, parameter in pairs]


METHOD = ExponentialMovingAverage
