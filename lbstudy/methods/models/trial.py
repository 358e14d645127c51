"""One training pass of a network on two images: does it do what a run needs of it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lbstudy.methods.models.model import Shape
from lbstudy.parallel.batch_norm import BatchNorm

SAMPLES = 2


class Seen(NamedTuple):
    """What a batch norm was given."""

    rows: int
    values: int  # per channel


def try_out(network: nn.Module, shape: Shape, classes: int) -> str | None:
    """What is wrong with the outputs or the batch norm of a network, as the rest of a sentence about it; or None.

    Raises:
        Exception: whatever the network raises on such images.
    """
    states = {name: tensor._version for name, tensor in network.state_dict(keep_vars=True).items()}
    outputs, seen = _pass(network, shape)
    if not isinstance(outputs, Tensor):
        return f"gives a {type(outputs).__name__}, but must give a tensor of N x classes = {(SAMPLES, classes)}"
    if outputs.shape != (SAMPLES, classes):
        return f"gives outputs of shape {tuple(outputs.shape)}, but must give N x classes = {(SAMPLES, classes)}"
    for name, layer in network.named_modules():
        if isinstance(layer, BatchNorm) and layer.ghost and layer in seen and seen[layer].rows != SAMPLES:
            return (
                f"normalises {seen[layer].rows} rows for {SAMPLES} images in its batch norm {name}, so that ghost "
                "batches cannot be told apart; use batch norm over the whole mini-batch"
            )
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor._version != states.get(name):
            return f"changes {name} while it is trained; every worker would have its own"
    return None


def normalises_vectors(network: nn.Module, shape: Shape) -> bool:
    """Whether a batch norm sees a single value per channel of an image, so that one sample has no variance there."""
    _, seen = _pass(network, shape)
    return any(layer.values <= SAMPLES for layer in seen.values())


def works_with_channels_last(network: nn.Module, shape: Shape) -> bool:
    """Whether a network takes images, and works, with the channels last in memory: `view` of what a convolution gives
    raises a RuntimeError then."""
    try:
        _pass(network, shape, torch.channels_last)
    except RuntimeError:
        return False
    return True


def _pass(
    network: nn.Module, shape: Shape, layout: torch.memory_format = torch.contiguous_format
) -> tuple[object, dict[BatchNorm, Seen]]:
    """Outputs of a training pass over SAMPLES images, and what the batch norms saw."""
    seen: dict[BatchNorm, Seen] = {}

    def look(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchNorm)
        seen[layer] = Seen(len(arguments[0]), arguments[0].numel() // layer.num_features)

    layers = [module for module in network.modules() if isinstance(module, BatchNorm)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    first = next(network.parameters())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _training(network), _over_this_batch(layers):
            images = torch.rand(SAMPLES, *shape, device=first.device, dtype=first.dtype)
            return network(images.clone(memory_format=layout)), seen  # `contiguous` may leave one channel as it is
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _over_this_batch(layers: list[BatchNorm]) -> Iterator[None]:
    """Batch norm over all rows it is given, without other workers."""
    ghosts = [layer.ghost for layer in layers]
    for layer in layers:
        layer.ghost = 2**62
    try:
        yield
    finally:
        for layer, ghost in zip(layers, ghosts, strict=True):
            layer.ghost, layer._latest = ghost, []
