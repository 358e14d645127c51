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


class AdamNumbers(WeightDecay):
    """What Adam (Kingma & Ba 2015) and its relatives have."""

    beta1: float = Field(0.9, ge=0, lt=1, description="of the past in the mean of the gradient")
    beta2: float = Field(0.999, ge=0, lt=1, description="of the past in the mean of its square")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean square")
