"""How large a model and its checkpoint are, counted on the network itself; `models.check` gives one without numbers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lbstudy.methods.optimizers.kfac_blocks import KroneckerBlock, blocks_of

# Numbers that a checkpoint holds for each parameter: itself, and what the optimizer remembers of it.
COPIES = {"sgd": 2, "lars": 2, "adamw": 3, "kfac": 2}
TENSOR_BYTES = 500  # what torch.save adds to each tensor: names, alignment, directory


def model_bytes(model: nn.Module, element: int) -> int:
    """A saved model, with the running statistics of its batch norm; `element` bytes a floating-point number."""
    tensors = model.state_dict().values()
    counters = sum(tensor.nbytes for tensor in tensors if not tensor.is_floating_point())
    return counters + _bytes((tensor.numel() for tensor in tensors if tensor.is_floating_point()), element)


def checkpoint_bytes(model: nn.Module, optimizer: str, element: int) -> int:
    """A snapshot of a run: model and optimizer."""
    factors = _bytes(factor_numbers(model), element) if optimizer == "kfac" else 0
    return COPIES[optimizer] * model_bytes(model, element) + factors


def factor_numbers(model: nn.Module) -> list[int]:
    """How many numbers each tensor holds that K-FAC keeps of a model: statistics and inverses, at most.

    These are A and G of each layer and their inverses (eigenvectors have eigenvalues as one more row), and of each
    batch-norm channel three numbers of its Fisher matrix and three of the inverse.

    Raises:
        ValueError: K-FAC does not support one of the layers.
    """
    numbers = []
    for block in blocks_of(model, "eigen", unitwise_batch_norm=True):
        for statistic in block.statistics:
            rows, columns = block.zeros(statistic).shape
            numbers += [rows * columns, (rows + isinstance(block, KroneckerBlock)) * columns]
    return numbers


def _bytes(tensors: Iterable[int], element: int) -> int:
    """Of saved tensors of so many numbers each."""
    return sum(element * numbers + TENSOR_BYTES for numbers in tensors)
