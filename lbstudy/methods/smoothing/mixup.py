"""Mixup (Zhang et al. 2018): inputs and labels are those of two samples in proportion."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lbstudy.methods.smoothing import Inputs, Part, Smoothing
from lbstudy.parallel.device import to_device
from lbstudy.parallel.randomness import stream
from lbstudy.study.run import Spec


class Numbers(Spec):
    """Mixup's hyper-parameter."""

    mixup_alpha: float = Field(gt=0, description="both parameters of the Beta distribution of the coefficients")


class Settings(Spec):
    """Mixup beyond its alpha."""

    per: Literal["mini_batch", "sample"] = Field("mini_batch", description="what a mixing coefficient is drawn for")


class Mixing(NamedTuple):
    """The draws of one mini-batch of n samples."""

    coefficients: Tensor  # lambda of each sample, n; all alike unless drawn per sample
    partners: Tensor  # position in the mini-batch of each sample's partner, n; a permutation


class Mixup(Smoothing):
    """lambda x_i + (1 - lambda) x_j and the labels alike, with lambda ~ Beta(alpha, alpha), not folded to [1/2, 1]."""

    label = "Mixup"
    source = "Zhang et al. 2018"
    Numbers = Numbers
    Settings = Settings

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        super().__init__(model, numbers, settings, seed)
        self._latest: tuple[Any, Mixing] | None = None  # of a mini-batch that may come in several passes

    def draw(self, step: int, size: int, device: torch.device, dtype: torch.dtype) -> Mixing:
        """The draws of the mini-batch at this step."""
        key = (step, size, device, dtype)
        if self._latest is None or self._latest[0] != key:
            draws = stream(self.seed, "mixup", step)
            alpha = self.numbers.mixup_alpha
            coefficients = draws.beta(alpha, alpha, size=size if self.settings.per == "sample" else 1)
            partners = to_device(draws.permutation(size), device)
            self._latest = key, Mixing(to_device(coefficients, device).to(dtype).expand(size), partners)
        return self._latest[1]

    def inputs(self, part: Part) -> Inputs:
        """The part's samples, each mixed with its partner from anywhere in the mini-batch."""
        drawn = self.draw(part.step, part.size, part.device, part.dtype)
        own, shares = part.own(), drawn.coefficients[part.positions]
        partners = part.partners(own, drawn.partners)
        return Inputs(mix(own.images, partners.images, shares), own.labels, partners.labels, shares)


def mix(images: Tensor, partner_images: Tensor, coefficients: Tensor) -> Tensor:
    """lambda x_i + (1 - lambda) x_j."""
    return torch.lerp(partner_images, images, coefficients.view(-1, *[1] * (images.ndim - 1)))


METHOD = Mixup
