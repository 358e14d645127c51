"""Noise on the weights: SmoothOut (Wen et al. 2018) and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lbstudy.methods.smoothing import Draw, Smoothing
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.parallel.randomness import derive_seed
from lbstudy.study.run import Spec


class Numbers(Spec):
    """Parameter noise's hyper-parameter."""

    noise_magnitude: float = Field(gt=0, description="half width, or standard deviation, of the noise")


class Settings(Spec):
    """Parameter noise beyond its magnitude."""

    distribution: Literal["uniform", "gaussian"] = "uniform"
    scale: Literal["none", "filter", "weight"] = Field(
        "none", description="none: SmoothOut; filter: relative to each filter (AdaSmoothOut); weight: to each weight"
    )
    copies: int = Field(1, gt=0, description="perturbed copies averaged per step; 1 is the stochastic version")
    schedule: Literal["constant", "annealed"] = Field("constant", description="annealed: (1 + step)^-0.275")
    denoise: bool = Field(True, description="false: noise is added with the update and stays (JSAI 2019, eq. 1)")
    batch_norm: bool = Field(False, description="perturb batch-norm parameters too")
    ghost: int | None = Field(
        None, gt=0, description="one draw per ghost batch of this many samples, not per mini-batch"
    )

    @model_validator(mode="after")
    def _noise_that_stays_is_one_draw(self) -> Settings:
        if not self.denoise and (self.copies > 1 or self.ghost is not None):
            raise ValueError("`denoise: false` adds one draw per step: `copies` must be 1 and `ghost` left out")
        return self


class ParameterNoise(Smoothing):
    """Noise on a model's parameters, drawn anew for every (step, ghost batch, copy).

    SmoothOut (Wen et al. 2018, algorithm 1): theta + noise in the forward and backward pass, the step is taken on
    the clean theta. With scale `filter` it is AdaSmoothOut: the noise of each filter (index of dimension 0) is
    rescaled to the norm of its weights.
    """

    label = "parameter noise"
    source = "Wen et al. 2018"
    Numbers = Numbers
    Settings = Settings

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        super().__init__(model, numbers, settings, seed)
        norms = [] if settings.batch_norm else [m for m in model.modules() if isinstance(m, BatchNorm)]
        excluded = {id(parameter) for norm in norms for parameter in norm.parameters()}
        self._parameters: list[Tensor] = [p for p in model.parameters() if id(p) not in excluded]
        self._sizes = [p.numel() for p in self._parameters]
        self.ghost, self.copies = settings.ghost, settings.copies

    def strength(self, step: int) -> float:
        """The magnitude at a step: constant, or annealed as (1 + step)^-0.275, the exponent of SmoothOut's code."""
        return self.numbers.noise_magnitude * ((1 + step) ** -0.275 if self.settings.schedule == "annealed" else 1.0)

    @torch.no_grad()
    def noise(self, draw: Draw) -> list[Tensor]:
        """The noise of each perturbed parameter."""
        first = self._parameters[0]
        generator = torch.Generator(first.device)
        generator.manual_seed(derive_seed(self.seed, "noise", draw.step, draw.ghost_batch, draw.copy))
        flat = torch.empty(sum(self._sizes), dtype=first.dtype, device=first.device)
        if self.settings.distribution == "uniform":
            flat.uniform_(-1, 1, generator=generator)
        else:
            flat.normal_(generator=generator)
        parts = [part.view_as(p) for part, p in zip(flat.split(self._sizes), self._parameters, strict=True)]
        if self.settings.scale == "weight":
            torch._foreach_mul_(parts, list(torch._foreach_abs(self._parameters)))
        elif self.settings.scale == "filter":
            for part, parameter in zip(parts, self._parameters, strict=True):
                part.mul_(_filter_norms(parameter) / (_filter_norms(part) + 1e-6))
        flat.mul_(self.strength(draw.step))
        return parts

    def perturbed(self, draw: Draw) -> AbstractContextManager[None]:
        """Within the block the parameters carry noise; afterwards they are what they were, to the bit."""
        return self._within(draw) if self.settings.denoise else nullcontext()

    @contextmanager
    def _within(self, draw: Draw) -> Iterator[None]:
        with torch.no_grad():
            clean = [p.clone() for p in self._parameters]
            torch._foreach_add_(self._parameters, self.noise(draw))
        try:
            yield
        finally:
            with torch.no_grad():  # (p + n) - n is not p in floating point, hence the copy
                torch._foreach_copy_(self._parameters, clean)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Without `denoise` add noise that stays: theta <- theta + noise, after the update (JSAI 2019, eq. 1)."""
        if not self.settings.denoise:
            torch._foreach_add_(self._parameters, self.noise(Draw(step)))


def _filter_norms(tensor: Tensor) -> Tensor:
    """Euclidean norm of each filter, broadcastable; a filter is an index of dimension 0 (a scalar for 1-D tensors)."""
    return tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim > 1 else tensor.abs()


METHOD = ParameterNoise
