"""The ResNets for CIFAR by depth: `resnet{6n+2}` of He et al. 2016, section 4.2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.declaration import MethodError
from lbstudy.methods.models.model import Model, Shape

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of n blocks with 16, 32 and 64 filters, global average pooling, a linear layer.

    The first block of the second and the third stage has stride 2. Convolutions are initialised by He et al. 2015
    (normal, fan-out), the linear layer as torch does.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        blocks: n, blocks a stage; the depth is 6n + 2.
    """

    def __init__(self, shape: Shape, classes: int, blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages, channels = [], WIDTHS[0]
        for width in WIDTHS:
            inputs = [channels] + [width] * (blocks - 1)
            stages.append(nn.Sequential(*[Block(channels, width) for channels in inputs]))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N x classes."""
        features = self.stages(F.relu(self.bn1(self.conv1(images))))
        return self.fc(features.mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut without parameters (He et al. 2016, option A).

    Where the width grows, the shortcut takes every second pixel and fills up the channels with zeros.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.stride, self.missing = (1, 0) if channels == width else (2, width - channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """N x width x H / stride x W / stride."""
        shortcut = inputs
        if self.missing:
            shortcut = F.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        outputs = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(outputs)) + shortcut)


def of_depth(depth: int, source: str = "He et al. 2016") -> Model:
    """The CIFAR ResNet of a depth.

    Raises:
        MethodError: the depth is not 6n + 2 with n of 1 or more, or one of ImageNet's networks has it too.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        below = max(6 * blocks + 2, 8)
        raise MethodError(
            f"resnet{depth}: the CIFAR ResNets have 6n + 2 layers (resnet{below}, resnet{below + 6}, ...); "
            f"ImageNet's are `torchvision:resnet{{18, 34, 50, 101, 152}}`"
        )
    if depth in (50, 152):
        raise MethodError(
            f"resnet{depth} could be CIFAR's network of 6n + 2 layers or ImageNet's; for the first take "
            f"resnet{depth - 6} or resnet{depth + 6}, the second is `torchvision:resnet{depth}`"
        )

    def build(shape: Shape, classes: int) -> nn.Module:
        return CifarResNet(shape, classes, blocks)

    return Model(label=f"ResNet-{depth}", source=source, build=build)
