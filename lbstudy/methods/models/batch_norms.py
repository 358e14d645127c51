"""Torch's batch norm in a network, made ours: synchronised, or over ghost batches."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbstudy.parallel.batch_norm import BatchNorm

FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)


def with_our_batch_norm(network: nn.Module, ghost: int | None) -> nn.Module:
    """The network with each batch norm replaced by ours, with the same parameters, buffers, eps and names.

    timm's batch norm with an activation becomes a sequence of `norm`, `drop` and `act`. Statistics that ours
    computes afresh need no momentum; it is kept for those who look.

    Args:
        network: changed in place, where it is not itself a batch norm.
        ghost: samples of a ghost batch; None for the global mini-batch.

    Raises:
        ValueError: a batch norm computes something else than torch's.
    """
    ours: dict[Any, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            ours[module] = _ours(module, name, ghost)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # not `named_children`, which tells of a shared one once
            if child in ours:
                setattr(parent, name, ours[child])
    return ours.get(network, network)


def _ours(layer: _BatchNorm, name: str, ghost: int | None) -> nn.Module:
    with_activation = _is_timms(layer)
    if not with_activation and type(layer).forward not in FORWARDS:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise ValueError(
            f"its batch norm {name} is a {kind}, whose forward pass is its own, so that its statistics cannot be made "
            "independent of the number of workers; use torch's batch norm"
        )
    if not layer.track_running_stats:
        raise ValueError(
            f"its batch norm {name} has track_running_stats=False, so that an image's evaluation would depend on the "
            "images beside it; leave that out"
        )
    new = BatchNorm(layer.num_features, ghost, eps=layer.eps, affine=layer.affine)
    new.momentum = layer.momentum
    for key, parameter in layer._parameters.items():
        new.register_parameter(key, parameter)
    for key, buffer in layer._buffers.items():
        new.register_buffer(key, buffer)
    if not with_activation:
        return new
    timms = cast(Any, layer)
    return nn.Sequential(OrderedDict(norm=new, drop=timms.drop, act=timms.act))


def _is_timms(layer: nn.Module) -> bool:
    """Whether it is timm's batch norm with an activation after it."""
    timm = sys.modules.get("timm.layers")
    return timm is not None and type(layer) in (timm.BatchNormAct2d, timm.SyncBatchNormAct)
