"""`random_resized_crop`: a part of each image, of random area and aspect ratio, brought to one size.

The crop of Inception (Szegedy et al. 2015, section 6) with torchvision's rules and numbers: an area of 8 to 100 % of
the image and an aspect ratio of 3/4 to 4/3, drawn up to ten times until the box fits into the image; else the largest
box in the middle whose ratio is allowed.
"""

from __future__ import annotations

from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def random_boxes(draw: np.random.Generator, count: int, height: int, width: int) -> NDArray[np.int64]:
    """Top, left, height and width of a part of each image: count x 4."""
    boxes = np.empty((count, 4), np.int64)
    boxes[:] = _middle(height, width)
    left = np.arange(count)
    for _ in range(ATTEMPTS):
        area = height * width * draw.uniform(*AREA, size=len(left))
        ratio = np.exp(draw.uniform(log(RATIO[0]), log(RATIO[1]), size=len(left)))
        tall, wide = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area / ratio, area * ratio))
        fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
        tall, wide = tall[fits], wide[fits]
        tops, lefts = draw.integers(height - tall + 1), draw.integers(width - wide + 1)
        boxes[left[fits]] = np.stack([tops, lefts, tall, wide], axis=1)
        left = left[~fits]
    return boxes


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    tall = min(height, round(width / RATIO[0]))
    wide = min(width, round(height * RATIO[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resized(images: Tensor, boxes: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Each image's part, brought to a size by linear interpolation, which does not smooth where it makes it smaller.

    Args:
        images: k x C x H x W.
        boxes: top, left, height and width, k x 4.
        size: height and width of the result.
        dtype: of the result.
    """
    grid = torch.stack(
        torch.broadcast_tensors(
            _coordinates(boxes[:, 1], boxes[:, 3], size[1], images.shape[3], dtype)[:, None, :],
            _coordinates(boxes[:, 0], boxes[:, 2], size[0], images.shape[2], dtype)[:, :, None],
        ),
        dim=-1,
    )
    return F.grid_sample(images.to(dtype), grid, padding_mode="border", align_corners=False)


def _coordinates(begin: Tensor, extent: Tensor, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Where the pixels of the result lie along an axis of `size` pixels, in units of its half from its middle, as
    `grid_sample` wants them: k x count. What is beyond a part's edge is its edge."""
    steps = (torch.arange(count, device=begin.device, dtype=dtype) + 0.5) / count
    begin, extent = begin[:, None].to(dtype), extent[:, None].to(dtype)
    places = torch.clamp(begin + extent * steps, min=begin + 0.5, max=begin + extent - 0.5)
    return places * (2 / size) - 1
