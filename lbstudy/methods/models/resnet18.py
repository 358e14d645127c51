"""ResNet-18 as torchvision builds it, with a stem for small images."""

from __future__ import annotations

from torch import nn

from lbstudy.methods.models.model import Model, Shape
from lbstudy.methods.models.stem import give_small_stem


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """ResNet-18 (He et al. 2016, table 1) whose first convolution is 3x3 with stride 1, without max-pooling after it.

    11,173,962 parameters on 3x32x32 images and 10 classes.
    """
    import torchvision  # only here: the import takes seconds

    network = torchvision.models.resnet18(num_classes=classes)
    give_small_stem(network, shape[0])
    return network


METHOD = Model(label="ResNet-18", source="He et al. 2016", build=resnet18)
