"""Small networks of a user's own."""

from torch import nn

Shape = tuple[int, int, int]


def small(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions with batch norm, and a linear layer.

    No bias before batch norm: its gradient is zero but for rounding, which Adam's division by the gradient's size makes
    visible (1e-9 between one worker and two).
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, classes),
    )  # fmt: skip


def dropping(shape: Shape, classes: int) -> nn.Module:
    """The same with dropout before the last layer."""
    *layers, last = small(shape, classes)
    return nn.Sequential(*layers, nn.Dropout(0.3), last)


class Viewing(nn.Module):
    """A convolution whose outputs are flattened by `view`, which takes them as torch lays them out by default."""

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        self.convolution = nn.Conv2d(shape[0], 4, 3, stride=4)
        self.linear = nn.Linear(4 * 8 * 8, classes)

    def forward(self, images):
        outputs = self.convolution(images).relu()
        return self.linear(outputs.view(len(outputs), -1))
