"""Max-pooling whose choice among equal inputs does not hang on rounding, for the passes that K-FAC learns G from.

Where an image is even (a background, the zeros around a crop) a convolution gives the same output at many positions,
but for rounding; so rounding decides which of them max-pooling lets through, and where the gradient goes. No gradient
of a parameter notices, for the patches at these positions are the same. But G = 1/(N T) sum_n sum_t g_t g_t^T does:
two channels count together only where their gradients meet at one position. With scikit-learn's digits a difference of
1e-16 between one worker and two, which multiply matrices of other shapes, thus became one of 1e-4 in a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def settled_ties(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's max-pooling layers pool as `max_pool` does."""
    layers = [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    for layer in layers:
        layer.forward = partial(max_pool, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def max_pool(layer: nn.MaxPool2d, images: Tensor) -> Tensor:
    """As the layer pools N x C x H x W, but inputs of a window that are equal within rounding count as equal.

    The choice is made among the inputs times 1 - k eps^(2/3), where k is 0, 1, ... over the positions of a window, so
    that equal ones are told apart by position; those of other windows have the same order. The output is the input at
    the chosen position, less than the maximum by no more than a relative 2.4e-5 (float32) or 3.7e-11 (float64) times
    the largest k. Half precision is compared in float32.
    """
    wide = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    down, right = (layer.kernel_size,) * 2 if isinstance(layer.kernel_size, int) else layer.kernel_size
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    order = (rows % down)[:, None] * right + columns % right
    preference = 1 - torch.finfo(wide.dtype).eps ** (2 / 3) * order.to(wide.dtype)
    _, chosen = F.max_pool2d(
        wide * preference, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode,
        return_indices=True,
    )  # fmt: skip
    return images.flatten(2).gather(2, chosen.flatten(2)).view_as(chosen)
