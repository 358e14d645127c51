"""Sharpness-aware minimisation (Foret et al. 2021), and its adaptive form ASAM (Kwon et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lbstudy.methods.smoothing import Smoothing
from lbstudy.study.run import Spec

ETA = 0.01
"""Added to the absolute weights in the adaptive form, as in its authors' code."""


class Numbers(Spec):
    """SAM's hyper-parameter."""

    sam_radius: float = Field(
        gt=0, description="rho, length of the ascent; SAM: 0.05, ASAM: 0.5 in the papers' CIFAR-10"
    )


class Settings(Spec):
    """SAM beyond its radius."""

    adaptive: bool = Field(False, description="ASAM: each weight moves in proportion to its own size")
    ghost: int | None = Field(
        None, gt=0, description="an ascent for each ghost batch of this many samples (m-SAM), not for the mini-batch"
    )


class SAM(Smoothing):
    """The gradient at w + e, where e climbs from the present weights w as steeply as it can (eq. 2 of the paper).

    e = rho g / ||g||, with g the gradient of the mini-batch's loss without weight decay and the norm over all
    parameters together; a zero gradient gives no ascent. Adaptive (Kwon et al. 2021, p = 2):
    e = rho T^2 g / ||T g||, T = |w| + 0.01 for each entry of the parameters named `weight`, in convolutions, linear
    layers and norms, and T = 1 for all others, such as biases: the authors' rule.

    A step costs two passes. Both have the same inputs, and batch norm takes each pass's own statistics. The training
    loss on record is that of the second pass, at w + e.

    With `ghost` each ghost batch has an ascent of its own, by its own gradient, whoever computes it: Foret et al.'s
    m-sharpness, whose m is a property of the method here and not the share of a worker.
    """

    label = "SAM"
    source = "Foret et al. 2021; adaptive: Kwon et al. 2021"
    Numbers = Numbers
    Settings = Settings

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        super().__init__(model, numbers, settings, seed)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters: list[Tensor] = [p for _, p in trained]
        self._scaled = [settings.adaptive and "weight" in name for name, _ in trained]
        self.ghost = settings.ghost

    @torch.no_grad()
    def ascent(self, gradient: list[Tensor]) -> list[Tensor]:
        """e of each parameter, for the gradient of each at the present weights."""
        scales = [p.abs() + ETA if scaled else None for p, scaled in zip(self._parameters, self._scaled, strict=True)]
        scaled = [g if t is None else t * g for g, t in zip(gradient, scales, strict=True)]  # T g
        norm = torch.nn.utils.get_total_norm(scaled)
        factor = torch.where(norm > 0, self.numbers.sam_radius / norm, 0)
        return [factor * (s if t is None else t * s) for s, t in zip(scaled, scales, strict=True)]

    def ascended(self, step: int, gradient: Callable[[], list[Tensor]]) -> AbstractContextManager[None]:
        """Within the block the weights are w + e; afterwards they are w, to the bit."""
        return self._within(gradient)

    @contextmanager
    def _within(self, gradient: Callable[[], list[Tensor]]) -> Iterator[None]:
        ascent = self.ascent(gradient())
        with torch.no_grad():
            before = [p.clone() for p in self._parameters]
            torch._foreach_add_(self._parameters, ascent)
        try:
            yield
        finally:
            with torch.no_grad():  # (w + e) - e is not w in floating point, hence the copy
                torch._foreach_copy_(self._parameters, before)


METHOD = SAM
