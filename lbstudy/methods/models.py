"""The networks of the sources: LeNet-5, VGG9, and torchvision's ResNet-18 with a stem for small images."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lbstudy.parallel.batch_norm import BatchNorm


def build(
    name: str, shape: tuple[int, int, int], classes: int, ghost: int | None = None, settings: object = None
) -> nn.Module:
    """A freshly initialised network; the initialisation draws from torch's global generator.

    Args:
        name: the network.
        shape: channels, height and width of an image.
        classes: outputs.
        ghost: samples of a ghost batch of its batch norm; None for the global mini-batch.
    """
    if name == "lenet5":
        return LeNet5(shape, classes)
    if name == "vgg9":
        return VGG9(shape, classes, ghost)
    import torchvision  # only here: the import takes seconds

    network = torchvision.models.resnet18(num_classes=classes, norm_layer=partial(BatchNorm, ghost=ghost))
    network.conv1 = nn.Conv2d(shape[0], 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class LeNet5(nn.Sequential):
    """LeNet-5 as in the HPML 2019 slides: conv5x5(6), pool, conv5x5(16), pool, 120, 84, classes; ReLU.

    62,006 parameters on 3x32x32 images and 10 classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int):
        convolutions = nn.Sequential(
            nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        super().__init__(
            *convolutions,
            nn.Linear(_features(convolutions, shape), 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, classes),
        )  # fmt: skip


class VGG9(nn.Module):
    """VGG9 as in Li et al. 2018 (loss-landscape): 7 convolutions, 2 linear layers; batch norm after all but the last.

    Convolutions are initialised by He et al. 2015 (normal, fan-in), linear layers by N(0, 1e-3) as there.
    2,789,706 parameters on 3x32x32 images and 10 classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, ghost: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        channels = shape[0]
        for stage in ((64, 64), (128, 128), (256, 256, 256)):
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), BatchNorm(width, ghost), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        layers.append(nn.Flatten())
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(_features(self.features, shape), 256), BatchNorm(256, ghost), nn.ReLU(), nn.Linear(256, classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1e-3)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N x classes."""
        return self.classifier(self.features(images))


@torch.no_grad()
def _features(layers: nn.Sequential, shape: tuple[int, int, int]) -> int:
    """Outputs per image of these layers."""
    outputs = layers.eval()(torch.zeros(1, *shape)).shape[1]
    layers.train()
    return outputs
