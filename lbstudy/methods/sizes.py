"""How large a model and its checkpoint are, counted on the network itself; `models.check` gives one without numbers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

TENSOR_BYTES = 500  # what torch.save adds to each tensor: names, alignment, directory


def model_bytes(model: nn.Module, element: int) -> int:
    """A saved model, with the running statistics of its batch norm; `element` bytes a floating-point number."""
    tensors = model.state_dict().values()
    counters = sum(tensor.nbytes for tensor in tensors if not tensor.is_floating_point())
    return counters + _bytes((tensor.numel() for tensor in tensors if tensor.is_floating_point()), element)


def checkpoint_bytes(model: nn.Module, remembered: Iterable[int], element: int, averaged: bool = False) -> int:
    """A snapshot of a run: model and optimizer, and where weights are averaged the averages and the model with them.

    Args:
        model: the network.
        remembered: numbers in each tensor of the optimizer's state, `Optimizer.remembers` of the model.
        element: bytes a floating-point number.
        averaged: whether weights are averaged.
    """
    return (3 if averaged else 1) * model_bytes(model, element) + _bytes(remembered, element)


def _bytes(tensors: Iterable[int], element: int) -> int:
    """Of saved tensors of so many numbers each."""
    return sum(element * numbers + TENSOR_BYTES for numbers in tensors)
