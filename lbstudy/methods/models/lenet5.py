"""LeNet-5, with the widths of LeCun et al. 1998."""

from __future__ import annotations

import torch
from torch import nn

from lbstudy.methods.models.model import Model, Shape


class LeNet5(nn.Sequential):
    """LeNet-5 as in the HPML 2019 slides: conv5x5(6), pool, conv5x5(16), pool, 120, 84, classes; ReLU.

    62,006 parameters on 3x32x32 images and 10 classes. The largest of four is taken before the ReLU: outputs and
    gradients are those of the other order, for a quarter of the ReLU's work.
    """

    def __init__(self, shape: Shape, classes: int):
        convolutions = nn.Sequential(
            nn.Conv2d(shape[0], 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            features = convolutions(torch.zeros(1, *shape)).shape[1]
        super().__init__(
            *convolutions,
            nn.Linear(features, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, classes),
        )  # fmt: skip


METHOD = Model(label="LeNet-5", source="LeCun et al. 1998", build=LeNet5)
