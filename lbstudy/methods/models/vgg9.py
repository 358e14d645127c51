"""VGG9, the network of Li et al. 2018."""

from __future__ import annotations

from torch import Tensor, nn

from lbstudy.methods.models.model import Model, Shape


class VGG9(nn.Module):
    """VGG9 as in Li et al. 2018 (loss-landscape): 7 convolutions, 2 linear layers; batch norm after all but the last.

    Convolutions are initialised by He et al. 2015 (normal, fan-in), linear layers by N(0, 1e-3) as there.
    2,789,706 parameters on 3x32x32 images and 10 classes.
    """

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels, height, width = shape
        for stage in ((64, 64), (128, 128), (256, 256, 256)):
            for filters in stage:
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
                channels = filters
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        layers.append(nn.Flatten())
        self.features = nn.Sequential(*layers)
        features = channels * -(-height // 8) * -(-width // 8)  # three pools, each rounded up
        self.classifier = nn.Sequential(
            nn.Linear(features, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, classes)
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


METHOD = Model(label="VGG9", source="Li et al. 2018", build=VGG9)
