"""The stem of a network that was made for other images: its first convolution, and the max-pooling after it."""

from __future__ import annotations

from itertools import takewhile

from torch import nn

KERNELS = (nn.Conv2d, nn.Linear)


def fit_channels(network: nn.Module, channels: int) -> None:
    """Make the first convolution anew for images of so many channels, unless it is for these already.

    Raises:
        ValueError: there is no such convolution, or it is of a kind that cannot be made anew.
    """
    name, old = _first_convolution(network)
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None, padding_mode=old.padding_mode,
    )  # fmt: skip
    _replace(network, name, _initialised(new))


def give_small_stem(network: nn.Module, channels: int) -> None:
    """Make the first convolution 3x3 with stride 1, and leave out the max-pooling before the second.

    He et al. 2016 have such a stem for CIFAR (section 4.2): the usual one leaves 8x8 of 32x32 pixels.

    Raises:
        ValueError: see `fit_channels`.
    """
    name, old = _first_convolution(network)
    new = nn.Conv2d(channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    _replace(network, name, _initialised(new))
    if isinstance(getattr(network, "maxpool", None), nn.Module):  # of a ResNet, whose stem may be three convolutions
        network.maxpool = nn.Identity()
        return
    names = [n for n, module in network.named_modules() if isinstance(module, (*KERNELS, nn.MaxPool2d))]
    after = names[names.index(name) + 1 :]
    for pool in takewhile(lambda n: isinstance(network.get_submodule(n), nn.MaxPool2d), after):
        _replace(network, pool, nn.Identity())


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first convolution in the module tree, and its name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            overridden = type(module).forward is not nn.Conv2d.forward
            if overridden or type(module)._conv_forward is not nn.Conv2d._conv_forward or module.groups > 1:
                raise ValueError(f"its first convolution, {name}, is a {module}, which cannot be made anew")
            return name, module
    raise ValueError("it has no convolution that could be made anew for these images")


def _initialised(convolution: nn.Conv2d) -> nn.Conv2d:
    """He et al. 2015 (normal, fan-out), as torchvision's ResNets are."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
