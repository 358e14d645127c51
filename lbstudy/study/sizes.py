"""How large a model and its checkpoint are, by formula: importing torch to ask it would take the driver seconds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

# Numbers that a checkpoint holds for each parameter: itself, and what the optimizer remembers of it.
COPIES: dict[str, int] = {"sgd": 2, "lars": 2, "adamw": 3, "kfac": 2}
TENSOR_BYTES = 500  # what torch.save adds to each tensor: names, alignment, directory


class Layers(NamedTuple):
    """The layers of a model that have parameters."""

    matrices: list[tuple[int, int]]  # of linear layers and convolutions: inputs (the bias's 1 included) and outputs
    batch_norms: list[int]  # channels

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(inputs * outputs for inputs, outputs in self.matrices) + 2 * sum(self.batch_norms)


def layers(model: str, shape: tuple[int, int, int], classes: int) -> Layers:
    """The layers of `models.build(model, shape, classes)`; shape is channels, height and width of an image."""
    channels, *sides = shape
    if model == "lenet5":
        features = 16 * math.prod(((side - 4) // 2 - 4) // 2 for side in sides)
        return Layers([(25 * channels + 1, 6), (151, 16), (features + 1, 120), (121, 84), (85, classes)], [])
    if model == "vgg9":
        widths = [64, 64, 128, 128, 256, 256, 256]
        convolutions = [(9 * a + 1, b) for a, b in pairwise([channels, *widths])]
        features = 256 * math.prod(-(-side // 8) for side in sides)
        return Layers([*convolutions, (features + 1, 256), (257, classes)], [*widths, 256])
    stages = [64, 128, 256, 512]  # ResNet-18: four convolutions each, and one on the short cut into all but the first
    matrices, batch_norms = [(9 * channels, 64)], [64]
    for before, width in zip([64, *stages], stages, strict=False):
        matrices += [(9 * before, width), *[(9 * width, width)] * 3]
        batch_norms += [width] * 4
        if before != width:
            matrices.append((before, width))
            batch_norms.append(width)
    return Layers([*matrices, (513, classes)], batch_norms)


def model_bytes(layers: Layers, element: int) -> int:
    """A saved model, with the running statistics of its batch norm; `element` bytes a number."""
    tensors = 2 * len(layers.matrices) + 5 * len(layers.batch_norms)
    return element * (layers.parameters + 2 * sum(layers.batch_norms)) + TENSOR_BYTES * tensors


def checkpoint_bytes(layers: Layers, optimizer: str, element: int) -> int:
    """A snapshot of a run: model and optimizer.

    K-FAC keeps A and G of each layer and their inverses (eigenvectors have eigenvalues as one more row), and of each
    batch-norm channel three numbers of its Fisher matrix and three of the inverse.
    """
    copies = COPIES[optimizer]
    size = copies * model_bytes(layers, element)
    if optimizer == "kfac":
        factors = sum(n * (2 * n + 1) for matrix in layers.matrices for n in matrix) + 6 * sum(layers.batch_norms)
        size += element * factors + TENSOR_BYTES * (4 * len(layers.matrices) + 2 * len(layers.batch_norms))
    return size
