"""Models from elsewhere: torchvision's and timm's by name, and a user's own functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lbstudy.methods.declaration import MethodError, attribute, unknown
from lbstudy.methods.models.model import Model, Shape
from lbstudy.methods.models.stem import fit_channels, give_small_stem

PRETRAINED = ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
              "checkpoint_path")  # fmt: skip
"""Settings of torchvision's and timm's that ask for trained weights."""


def from_torchvision(name: str) -> Model:
    """A classification network of torchvision's.

    Its settings are the keyword arguments of torchvision's function, and `stem: small`.

    Raises:
        MethodError: torchvision has none of this name.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise MethodError(unknown("classification network", name, known, " in torchvision"))
    builder = torchvision.models.get_model_builder(name)

    def build(shape: Shape, classes: int, *, stem: str | None = None, **settings: Any) -> nn.Module:
        network = builder(num_classes=classes, **_random(settings))
        if _is_small(stem):
            give_small_stem(network, shape[0])
        else:
            fit_channels(network, shape[0])
        return network

    return Model(label=name, source="torchvision", build=build)


def from_timm(name: str) -> Model:
    """A network of timm's, by its name there without a tag of pretrained weights.

    Its settings are the keyword arguments of `timm.create_model`, and `stem: small`.

    Raises:
        MethodError: timm is missing, or has none of this name.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MethodError(f"timm:{name} needs timm: pip install timm") from error

    known = timm.list_models()
    if name not in known:
        raise MethodError(unknown("network", name, known, " in timm"))

    def build(shape: Shape, classes: int, *, stem: str | None = None, **settings: Any) -> nn.Module:
        network = timm.create_model(name, num_classes=classes, in_chans=shape[0], **_random(settings))
        if _is_small(stem):
            give_small_stem(network, shape[0])
        return network

    return Model(label=name, source="timm", build=build)


def _random(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, if they ask for no weights.

    Raises:
        MethodError: they do.
    """
    for key in PRETRAINED:
        if settings.get(key):
            raise MethodError(f"`{key}` asks for trained weights, but a study starts from random ones; leave it out")
    return settings


def _is_small(stem: str | None) -> bool:
    if stem not in (None, "small"):
        raise MethodError(f"`stem` must be `small` or left out, but got {stem!r}")
    return stem == "small"


def from_users(dotted: str) -> Model:
    """What `module:function` names: a function (shape, classes, **settings) -> network, or a `Model`.

    Raises:
        MethodError: it cannot be imported, or is neither; an exception that importing it raised is the cause.
    """
    target = attribute("model", dotted)
    if isinstance(target, Model):
        return target
    if not callable(target):
        raise MethodError(f"model {dotted} is a {type(target).__name__}, not a function (shape, classes) -> network")
    _check_signature(dotted, target)
    return Model(label=dotted.split(":")[1], source=dotted, build=target)


def _check_signature(dotted: str, function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    names = list(signature.parameters)
    try:
        signature.bind_partial((3, 32, 32), 10)
    except TypeError as error:
        raise MethodError(
            f"{dotted} must take (shape, classes) and settings by name after these, but takes ({', '.join(names)})"
        ) from error
