"""CutMix (Yun et al. 2019): a box of each image is cut out of another one, and the labels share by area."""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lbstudy.methods.smoothing import Inputs, Part, Smoothing
from lbstudy.parallel.device import to_device
from lbstudy.parallel.randomness import stream
from lbstudy.study.run import Spec


class Numbers(Spec):
    """CutMix's hyper-parameter."""

    cutmix_alpha: float = Field(gt=0, description="both parameters of the Beta distribution of the area that stays")


class Box(NamedTuple):
    """Pixels that are pasted."""

    rows: slice
    columns: slice

    @property
    def area(self) -> int:
        """In pixels."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class Cut(NamedTuple):
    """The draws of one mini-batch of n samples."""

    box: Box
    partners: Tensor  # position in the mini-batch of each sample's partner, n; a permutation


class CutMix(Smoothing):
    """M x_i + (1 - M) x_j, with M zero in a box, and the labels in proportion to the areas (eq. 1 of the paper).

    lambda ~ Beta(alpha, alpha), one box for each mini-batch as in the authors' code: its centre is a pixel drawn
    uniformly, its sides are sqrt(1 - lambda) of the image's in whole pixels, and what lies outside is clipped (eq. 2).
    The share of a label is the area that is really there, not lambda.
    """

    label = "CutMix"
    source = "Yun et al. 2019"
    Numbers = Numbers

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        super().__init__(model, numbers, settings, seed)
        self._latest: tuple[Any, Cut] | None = None  # of a mini-batch that may come in several passes

    def draw(self, step: int, size: int, height: int, width: int, device: torch.device) -> Cut:
        """The draws of the mini-batch of `size` images at this step."""
        key = (step, size, height, width, device)
        if self._latest is None or self._latest[0] != key:
            draws = stream(self.seed, "cutmix", step)
            kept = draws.beta(self.numbers.cutmix_alpha, self.numbers.cutmix_alpha)
            row, column = int(draws.integers(height)), int(draws.integers(width))
            partners = to_device(draws.permutation(size), device)
            self._latest = key, Cut(box(kept, row, column, height, width), partners)
        return self._latest[1]

    def inputs(self, part: Part) -> Inputs:
        """The part's samples, each with the box of its partner from anywhere in the mini-batch."""
        own = part.own()
        height, width = own.images.shape[2:]
        drawn = self.draw(part.step, part.size, height, width, part.device)
        partners = part.partners(own, drawn.partners)
        boxes = (slice(None), slice(None), drawn.box.rows, drawn.box.columns)
        mixed = own.images.clone()
        mixed[boxes] = partners.images[boxes]
        share = 1 - drawn.box.area / (height * width)
        shares = torch.full_like(own.labels, share, dtype=part.dtype)
        return Inputs(mixed, own.labels, partners.labels, shares)


def box(kept: float, row: int, column: int, height: int, width: int) -> Box:
    """The box around a centre in an image of which it would leave the share `kept`, if it were not clipped."""

    def side(centre: int, whole: int) -> slice:
        half = int(whole * sqrt(1 - kept)) // 2
        return slice(max(centre - half, 0), min(centre + half, whole))

    return Box(side(row, height), side(column, width))


METHOD = CutMix
