"""Training passes of a network as CUDA graphs: the host starts all kernels of a pass at once.

A step of a small network is as long as the host takes to start its kernels one by one. What is replayed is the same
kernels on the same memory, so a run's numbers do not change by a bit. Memory is what it costs: a graph keeps the
activations of a pass, beside those of the passes that are not replayed. Hence a run's first epoch is without, after
which there is either room for them or not.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lbstudy.methods import models
from lbstudy.training.loop import DTYPES, Loop, autocast, format_of, seed_generator

DEVICES = ("cuda",)


class Shown(NamedTuple):
    """What a pass comes to."""

    logits: Tensor
    gradients: list[Tensor]  # of each parameter that is trained; without numbers where it takes no part


def replaying(loop: Loop, shape: models.Shape) -> Loop:
    """The loop with a network that replays its passes over whole mini-batches, where that can be done and gives the
    same; else the loop as it is.

    It can where a worker is alone, a step is one pass (what several add up to would lie in the graph's own memory), and
    the methods are lbstudy's, or the network torchvision's: a graph is blind to what others may do in Python at every
    pass.

    Args:
        loop: of a run, with everything a step needs in its memory.
        shape: channels, height and width of an image.
    """
    run, device = loop.run, next(loop.model.parameters()).device
    of_others = ":" in run.model.name.removeprefix("torchvision:") + run.optimizer + run.smoothing
    passes = sum(map(len, loop.forward_passes(run.batch_size)))
    if device.type not in DEVICES or of_others or run.compile or loop.workers.size > 1 or passes > 1:
        return loop
    images = torch.zeros(run.batch_size, *shape, device=device, dtype=DTYPES[run.precision])
    images = images.contiguous(memory_format=format_of(loop.model))
    try:
        network = Replaying(loop.model, images, run.precision)
        return loop._replace(network=network) if network.gives_the_same() else loop
    except RuntimeError:  # no room for it, or the network does what cannot be captured
        return loop


class Replaying(nn.Module):
    """A network whose training passes are replayed, unless someone listens to its layers.

    Args:
        network: in training mode.
        images: of a mini-batch: k x C x H x W, like all that shall be replayed.
        precision: of the run.
    """

    def __init__(self, network: nn.Module, images: Tensor, precision: str):
        super().__init__()
        self.network, self._images, self._precision = network, images, precision
        self._replay = capture(_Pass(network, precision), images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        heard = self.network._forward_hooks  # K-FAC's are there on steps that update its statistics
        alike = images.shape == self._images.shape and self.network.training and torch.is_grad_enabled()
        return self._replay(images) if alike and not heard else self.network(images)

    def gives_the_same(self) -> bool:
        """Whether a replayed pass over images that the capture has not seen is the network's own, to the bit."""
        images = torch.rand_like(self._images)
        own, replayed = (self._shown(network, images) for network in (self.network, self))
        return torch.equal(own.logits, replayed.logits) and all(map(torch.equal, own.gradients, replayed.gradients))

    def _shown(self, network: nn.Module, images: Tensor) -> Shown:
        seed_generator(images.device, 0)
        with self._autocast():
            logits = network(images)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
        return Shown(logits.clone(), [images.new_empty(0) if g is None else g.clone() for g in found])

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self._precision, self._images.device)


class _Pass(nn.Module):
    """A forward pass in the run's precision; autocast's cache of weights would outlive a captured pass."""

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self._precision = network, precision

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast(images.device.type, torch.bfloat16, self._precision == "bf16", cache_enabled=False):
            return self.network(images)


def capture(network: nn.Module, images: Tensor) -> nn.Module:
    """The network, with its forward and backward passes over such images captured.

    Raises:
        torch.OutOfMemoryError: there is no room for a graph and, beside it, for passes without.
    """
    # torch warns of backward passes that begin on the capture's stream and end on another; it orders them rightly
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)
    before = torch.cuda.memory_allocated(images.device)
    graphed = torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
    assert isinstance(graphed, nn.Module)
    torch.cuda.empty_cache()  # what the capture tried first on a stream of its own
    if torch.cuda.mem_get_info(images.device)[0] < torch.cuda.memory_allocated(images.device) - before:
        raise torch.OutOfMemoryError
    return graphed
