"""Smoothing of the loss: Mixup (of the inputs) and parameter noise (of the weights).

Both are functions of (seed, step): every worker knows the draws of the whole mini-batch and takes its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.parallel.randomness import derive_seed, stream
from lbstudy.study.run import MixupSpec, NoiseSpec


class Mixing(NamedTuple):
    """The Mixup draws of one mini-batch of n samples."""

    coefficients: Tensor  # lambda of each sample, n; all alike unless drawn per sample
    partners: Tensor  # position in the mini-batch of each sample's partner, n; a permutation

    def part(self, positions: slice) -> Mixing:
        """The draws of a slice of the mini-batch; partners may lie outside it."""
        return Mixing(self.coefficients[positions], self.partners[positions])


def draw_mixing(
    spec: MixupSpec, alpha: float, seed: int, step: int, samples: int, device: torch.device, dtype: torch.dtype
) -> Mixing:
    """lambda ~ Beta(alpha, alpha), not folded to [1/2, 1], and a random partner for each sample (Zhang et al. 2018)."""
    draw = stream(seed, "mixup", step)
    coefficients = draw.beta(alpha, alpha, size=samples if spec.per == "sample" else 1)
    partners = draw.permutation(samples)
    return Mixing(
        torch.from_numpy(coefficients).to(device, dtype).expand(samples), torch.from_numpy(partners).to(device)
    )


def mix(images: Tensor, partner_images: Tensor, coefficients: Tensor) -> Tensor:
    """lambda x_i + (1 - lambda) x_j."""
    return torch.lerp(partner_images, images, coefficients.view(-1, *[1] * (images.ndim - 1)))


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partner_labels: Tensor, coefficients: Tensor) -> Tensor:
    """Sum over samples of lambda CE(y_i) + (1 - lambda) CE(y_j), which is the cross-entropy with the soft label."""
    own = F.cross_entropy(logits, labels, reduction="none")
    partner = F.cross_entropy(logits, partner_labels, reduction="none")
    return (coefficients * own + (1 - coefficients) * partner).sum()


class ParameterNoise:
    """Noise on a model's parameters, drawn anew for every (step, ghost batch, copy).

    SmoothOut (Wen et al. 2018, algorithm 1): theta + noise in the forward and backward pass, the step is taken on
    the clean theta. With scale `filter` it is AdaSmoothOut: the noise of each filter (index of dimension 0) is
    rescaled to the norm of its weights.
    """

    def __init__(self, model: nn.Module, spec: NoiseSpec, magnitude: float, seed: int):
        norms = [] if spec.batch_norm else [m for m in model.modules() if isinstance(m, BatchNorm)]
        excluded = {id(parameter) for norm in norms for parameter in norm.parameters()}
        self._parameters: list[Tensor] = [p for p in model.parameters() if id(p) not in excluded]
        self._sizes = [p.numel() for p in self._parameters]
        self._spec, self._magnitude, self._seed = spec, magnitude, seed

    def strength(self, step: int) -> float:
        """The magnitude at a step: constant, or annealed as (1 + step)^-0.275, the exponent of SmoothOut's code."""
        return self._magnitude * ((1 + step) ** -0.275 if self._spec.schedule == "annealed" else 1.0)

    @torch.no_grad()
    def draw(self, step: int, ghost_batch: int = 0, copy: int = 0) -> list[Tensor]:
        """The noise of each perturbed parameter."""
        first = self._parameters[0]
        generator = torch.Generator(first.device)
        generator.manual_seed(derive_seed(self._seed, "noise", step, ghost_batch, copy))
        flat = torch.empty(sum(self._sizes), dtype=first.dtype, device=first.device)
        if self._spec.distribution == "uniform":
            flat.uniform_(-1, 1, generator=generator)
        else:
            flat.normal_(generator=generator)
        noise = [part.view_as(p) for part, p in zip(flat.split(self._sizes), self._parameters, strict=True)]
        if self._spec.scale == "weight":
            torch._foreach_mul_(noise, list(torch._foreach_abs(self._parameters)))
        elif self._spec.scale == "filter":
            for part, parameter in zip(noise, self._parameters, strict=True):
                part.mul_(_filter_norms(parameter) / (_filter_norms(part) + 1e-6))
        flat.mul_(self.strength(step))
        return noise

    @contextmanager
    def perturbed(self, step: int, ghost_batch: int = 0, copy: int = 0) -> Iterator[None]:
        """Within the block the parameters carry noise; afterwards they are what they were, to the bit."""
        with torch.no_grad():
            clean = [p.clone() for p in self._parameters]
            torch._foreach_add_(self._parameters, self.draw(step, ghost_batch, copy))
        try:
            yield
        finally:
            with torch.no_grad():  # (p + n) - n is not p in floating point, hence the copy
                torch._foreach_copy_(self._parameters, clean)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Add noise that stays: theta <- theta + noise, after the update (JSAI 2019, eq. 1)."""
        torch._foreach_add_(self._parameters, self.draw(step))


def _filter_norms(tensor: Tensor) -> Tensor:
    """Euclidean norm of each filter, broadcastable; a filter is an index of dimension 0 (a scalar for 1-D tensors)."""
    return tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim > 1 else tensor.abs()
