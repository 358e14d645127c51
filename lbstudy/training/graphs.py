"""Training passes of a network as CUDA graphs: the host starts all kernels of a pass at once.

A step of a small network is as long as the host takes to start its kernels one by one. What is replayed is the same
kernels on the same memory, so a run's numbers do not change by a bit. Memory is what it costs: a graph keeps the
activations of a pass, beside those of the passes that are not replayed. A run's first epoch is without, and shows how
much that is.
"""

from __future__ import annotations

import gc
import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn

from lbstudy.training.data import ImageData
from lbstudy.training.loop import DTYPES, Loop, autocast, format_of, seed_generator

DEVICES = ("cuda",)


def replaying(loop: Loop, data: ImageData) -> Loop:
    """The loop with a network that replays its passes over whole mini-batches, where that can be done and gives the
    same; else the loop as it is.

    Args:
        loop: of a run that has trained for an epoch, whose peak of memory the device's statistics hold.
        data: what it is trained on.
    """
    run, device = loop.run, data.device
    if device.type not in DEVICES or not can_replay(loop, len(data.train)) or not has_room(device, data.gpu_share):
        return loop
    images = torch.zeros(run.batch_size, *data.shape, device=device, dtype=DTYPES[run.precision])
    images = images.contiguous(memory_format=format_of(loop.model))
    network = None
    with suppress(RuntimeError):  # raised after all for want of room, or by what cannot be captured
        network = Replaying(loop.model, images, run.precision)
        if network.gives_the_same():
            return loop._replace(network=network)
    del network, images
    release(device)
    return loop


def can_replay(loop: Loop, samples: int) -> bool:
    """Whether there are passes to replay, and it is safe.

    A worker must be alone, and a step one pass: what several add up to would lie in the graph's own memory. Methods
    must be lbstudy's, or the network torchvision's, for a graph is blind to what others may do in Python at every pass.
    And K-FAC must not look at every pass.
    """
    run = loop.run
    of_others = ":" in run.model.name.removeprefix("torchvision:") + run.optimizer + run.smoothing
    passes = sum(map(len, loop.forward_passes(run.batch_size)))
    watched = loop.optimizer.param_groups[0].get("factor_interval") == 1
    whole = run.batch_size <= samples
    return whole and passes == 1 and loop.workers.size == 1 and not (of_others or run.compile or watched)


def has_room(device: torch.device, share: float) -> bool:
    """Whether the most that steps and evaluations have taken so far fits once more beside itself, into a share of a
    GPU's memory."""
    release(device)
    needed = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    return 2 * needed <= min(free, share * total - torch.cuda.memory_reserved(device))


def release(device: torch.device) -> None:
    """Give back what graphs that nobody uses have held, and what the passes of before have."""
    gc.collect()  # in older versions of torch a captured network is in a cycle of references
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that was ever captured on
        torch.cuda.empty_cache()


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
        return all(map(torch.equal, self._shown(self.network, images), self._shown(self, images)))

    def _shown(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """What a pass comes to: logits, and each parameter's gradient, without numbers where it takes no part."""
        seed_generator(images.device, 0)
        with autocast(self._precision, images.device):
            logits = network(images)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
        return [images.new_empty(0) if tensor is None else tensor.clone() for tensor in (logits, *gradients)]


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

    From then on torch's warning of backward passes that begin on the capture's stream and end on another is not shown
    in this process; it orders them rightly.
    """
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)
    with torch.cuda.device(images.device):
        graphed = torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
    assert isinstance(graphed, nn.Module)
    return graphed
