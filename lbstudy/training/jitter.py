"""`color_jitter`: brightness, contrast and saturation of each image changed by a random factor, in random order.

Each of the three is a blend of the image with another one (Howard 2013; torchvision's ColorJitter without hue): black,
its mean grey, or itself in grey. The factor is uniform in [1 - strength, 1 + strength]; 1 leaves the image as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OPERATIONS = 3
BRIGHTNESS, CONTRAST = 0, 1  # the third is saturation
GREY = (0.2989, 0.587, 0.114)
"""How much red, green and blue count for the grey of a colour (ITU-R BT.601, as torchvision rounds it)."""


class Jitter(NamedTuple):
    """What is done with k images."""

    operations: Tensor  # k x 3: which of the three comes first, second and third
    factors: Tensor  # k x 3, of these, float64

    @classmethod
    def draw(cls, draws: np.random.Generator, count: int, strength: float, device: torch.device) -> Jitter:
        """That of `count` images."""
        order = draws.permuted(np.tile(np.arange(OPERATIONS), (count, 1)), axis=1)
        factors = draws.uniform(1 - strength, 1 + strength, size=(count, OPERATIONS))
        return cls(torch.from_numpy(order).to(device), torch.from_numpy(factors).to(device))

    def at(self, positions: Tensor) -> Jitter:
        """That of some of the images."""
        return Jitter(self.operations[positions], self.factors[positions])


def jittered(images: Tensor, jitter: Jitter, dtype: torch.dtype) -> Tensor:
    """Images of pixels from 0 to 255, k x C x H x W, each changed in its own way."""
    images, factors = images.to(dtype), jitter.factors.to(dtype)
    for place in range(OPERATIONS):
        operation = jitter.operations[:, place].view(-1, 1, 1, 1)
        grey = _grey(images)
        other = torch.where(operation == CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        other = torch.where(operation == BRIGHTNESS, torch.zeros_like(other), other)
        images = torch.lerp(other.expand_as(images), images, factors[:, place].view(-1, 1, 1, 1)).clamp(0, 255)
    return images


def _grey(images: Tensor) -> Tensor:
    """k x 1 x H x W; of other than three channels their mean."""
    if images.shape[1] != len(GREY):
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(GREY).view(-1, 1, 1)).sum(1, keepdim=True)
