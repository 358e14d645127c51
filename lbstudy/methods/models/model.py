"""What a model says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The declaration of a model; each file of a built-in one holds `MODEL = Model(...)`.

    Args:
        label: its name in tables and figures.
        source: where it comes from.
        build: (shape, classes, **settings) -> a freshly initialised network that turns N x C x H x W into
            N x classes logits. Its batch norm is torch's own; `models.build` makes it ours. Its parameters after the
            first two are the model's settings.
    """

    label: str
    source: str
    build: Callable[..., nn.Module]
