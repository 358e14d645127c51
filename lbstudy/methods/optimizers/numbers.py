"""Hyper-parameters that several optimizers have, with the same meaning and the same default."""

from __future__ import annotations

from pydantic import Field

from lbstudy.study.run import Spec


class WeightDecay(Spec):
    """Weight decay."""

    weight_decay: float = Field(0.0, ge=0)


class Momentum(WeightDecay):
    """Heavy-ball momentum and weight decay."""

    momentum: float = Field(0.9, ge=0, lt=1)


class NesterovMomentum(Momentum):
    """Momentum, of which the look-ahead may be taken (Nesterov), and weight decay."""

    nesterov: bool = Field(False, description="Nesterov's momentum, as in torch's SGD")
