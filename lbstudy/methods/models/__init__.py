"""The networks, one a file: what each is called, where it comes from, and how it is built.

A new built-in model is a new module here with a `METHOD`. Beside them a study may name `resnet{6n+2}` (`cifar_resnet`),
`torchvision:NAME`, `timm:NAME`, or a function of the user's own, `module:function` (`elsewhere`). All are written
with torch's batch norm, which `build` makes ours (`batch_norms`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lbstudy.methods import declaration
from lbstudy.methods.declaration import MethodError, built_in
from lbstudy.methods.models import elsewhere
from lbstudy.methods.models.batch_norms import with_our_batch_norm
from lbstudy.methods.models.cifar_resnet import of_depth
from lbstudy.methods.models.model import Model, Shape
from lbstudy.methods.models.trial import normalises_vectors, try_out, works_with_channels_last

__all__ = [
    "Model", "Shape", "build", "check", "find", "names", "normalises_vectors", "of_users", "works_with_channels_last",
]  # fmt: skip

OTHERS: dict[str, Callable[[str], Model]] = {"torchvision": elsewhere.from_torchvision, "timm": elsewhere.from_timm}


def names() -> list[str]:
    """The built-in models."""
    return built_in(sys.modules[__name__])


def of_users(name: str) -> bool:
    """Whether the model is a user's own."""
    return ":" in name and name.partition(":")[0] not in OTHERS


def find(name: str) -> Model:
    """The model of this name.

    Raises:
        MethodError: there is none, or what it needs is missing.
    """
    if name in names():
        return declaration.find("model", name, sys.modules[__name__])
    if depth := re.fullmatch(r"resnet(\d+)", name):
        return of_depth(int(depth[1]))
    origin, colon, rest = name.partition(":")
    if colon and origin and rest:
        return OTHERS[origin](rest) if origin in OTHERS else elsewhere.from_users(name)
    raise MethodError(
        f"{declaration.unknown('model', name, names())}; or resnet{{6n+2}}, torchvision:NAME, timm:NAME, or a function "
        "(shape, classes) of your own as module:function"
    )


def build(
    name: str, shape: Shape, classes: int, ghost: int | None = None, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """A freshly initialised network; the initialisation draws from torch's global generator.

    Args:
        name: the network, see `find`.
        shape: channels, height and width of an image.
        classes: outputs.
        ghost: samples of a ghost batch of its batch norm; None for the global mini-batch.
        settings: of the model; for those from elsewhere keyword arguments of the function that makes it.

    Raises:
        MethodError: there is no such model, it does not take these settings or images, or its batch norm is of a kind
            that cannot be made independent of the number of workers.
    """
    model, settings = find(name), settings or {}
    _check_settings(name, model, settings)
    try:
        network = model.build(shape, classes, **settings)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it must be an nn.Module, but is a {type(network).__name__}")
        if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
            raise TypeError("it has lazy layers; give them the sizes of their inputs")
        if next(network.parameters(), None) is None:
            raise TypeError("it has no parameters")
        return with_our_batch_norm(network, ghost)
    except Exception as error:
        given = "".join(f", {key}={value!r}" for key, value in settings.items())
        images = "x".join(map(str, shape))
        reason = f"cannot be built for images of {images} and {classes} classes{given}"
        raise MethodError(f"{name} {reason}: {_in_short(error)}") from error


def check(
    name: str, shape: Shape, classes: int, settings: Mapping[str, Any] | None = None, *, ghost: int | None = None
) -> nn.Module:
    """Build a network and try it on two images; see `build` for the arguments.

    Returns:
        The network; where possible on the meta device, without its numbers.

    Raises:
        MethodError: it cannot be built, does not take these images, does not give a logit per class, or would compute
            something that depends on the number of workers.
    """
    try:  # on the meta device in no time; but a function may look at numbers, which it has not
        return _checked("meta", name, shape, classes, ghost, settings)
    except Exception:
        return _checked("cpu", name, shape, classes, ghost, settings)


def _checked(
    device: str, name: str, shape: Shape, classes: int, ghost: int | None, settings: Mapping[str, Any] | None
) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network = build(name, shape, classes, ghost, settings)
        try:
            problem = try_out(network, shape, classes)
        except Exception as error:
            images = "x".join(map(str, shape))
            raise MethodError(f"{name} does not work with images of {images}: {_in_short(error)}") from error
    if problem:
        raise MethodError(f"{name} {problem}")
    return network


def _check_settings(name: str, model: Model, settings: Mapping[str, Any]) -> None:
    """Raise a MethodError where the model does not take these settings, or needs others."""
    parameters = list(inspect.signature(model.build).parameters.values())[2:]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key, value in settings.items():
            if key not in allowed:
                takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
                raise MethodError(f"{name} has no setting `{key}`, but got {value!r}; it {takes}")
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in settings]:
        raise MethodError(f"{name} needs the setting{'s' * (len(missing) > 1)} `{'`, `'.join(missing)}`")


def _in_short(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
