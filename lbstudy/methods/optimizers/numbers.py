"""Hyper-parameters and settings that several optimizers have, with the same meaning and the same default."""

from __future__ import annotations

from typing import Literal

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


class TrustSettings(Spec):
    """Of optimizers that scale the rate of each layer, LARS and LAMB."""

    one_dimensional: Literal["plain", "trust"] = Field(
        "plain", description="rate of biases and batch norm; plain: the learning rate; trust: scaled like all (paper)"
    )
