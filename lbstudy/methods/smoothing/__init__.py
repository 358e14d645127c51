"""Smoothing of the loss: what changes the inputs, the loss, or the weights that a gradient is taken at.

A module each, whose class is `METHOD`; one of a user's own is such a class too, named `module:Class`. The training loop
asks a smoothing at its places in the step, in the order of the methods below, and knows none by name. What a smoothing
draws is a function of (seed, step): every worker knows the draws of the whole mini-batch and takes its part.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.declaration import Declaration, MethodError, built_in, find, remembered
from lbstudy.study.run import RunSpec, Spec

NONE = "none"


class Part(NamedTuple):
    """Samples of a mini-batch that go through the network in one pass."""

    step: int  # optimizer steps before this one
    size: int  # samples of the mini-batch
    positions: slice  # of these samples in the mini-batch; empty for a worker without samples
    fetch: Callable[[Tensor | slice], tuple[Tensor, Tensor]]  # positions in the mini-batch, k -> images, labels
    device: torch.device
    dtype: torch.dtype  # of images

    def own(self) -> Inputs:
        """The part's samples as they are."""
        return Inputs(*self.fetch(self.positions))

    def partners(self, own: Inputs, partners: Tensor) -> Inputs:
        """The samples at these positions of the mini-batch, one for each of the part's own; where the part is the whole
        mini-batch they are among those."""
        if (self.positions.start, self.positions.stop) == (0, self.size):
            return Inputs(_rows(own.images, partners), own.labels.index_select(0, partners))
        return Inputs(*self.fetch(partners[self.positions]))


def _rows(images: Tensor, rows: Tensor) -> Tensor:
    """These of the images, in the same format in memory."""
    if images.is_contiguous():
        return images.index_select(0, rows)
    return images.movedim(1, -1).index_select(0, rows).movedim(-1, 1)


class Inputs(NamedTuple):
    """What goes into the network, and what should come out."""

    images: Tensor  # k x C x H x W
    labels: Tensor  # k
    other_labels: Tensor | None = None  # k, of samples that are both of one class and of another
    shares: Tensor | None = None  # k, how much of each sample is of the class `labels`


class Draw(NamedTuple):
    """Which of a step's draws a pass is under."""

    step: int  # optimizer steps before this one
    ghost_batch: int = 0  # number of the ghost batch in the mini-batch
    copy: int = 0  # of the samples, for smoothings that average several


class Smoothing:
    """One way of smoothing in one run. Each method is a place in the training step; here nothing happens there.

    Args:
        model: the network; its parameters are those that are trained.
        numbers: of the class `Numbers`.
        settings: of the class `Settings`.
        seed: of all draws.
    """

    label: ClassVar[str] = ""  # in tables, figures and sentences
    source: ClassVar[str] = ""  # citation
    Numbers: ClassVar[type[Spec]] = Spec
    """Its hyper-parameters, which may be tuned or fixed. One without a default must be given."""
    Settings: ClassVar[type[Spec]] = Spec
    """What else it can be told, `fixed.NAME` of a study."""

    ghost: int | None = None
    """Samples that must share a pass's draw; no worker's slice tears them apart. None: the whole mini-batch."""
    copies: int = 1
    """Passes of every sample, over which the loss is averaged."""

    def __init__(self, model: nn.Module, numbers: Any, settings: Any, seed: int):
        self.model, self.numbers, self.settings, self.seed = model, numbers, settings, seed

    def inputs(self, part: Part) -> Inputs:
        """What a pass over these samples puts into the network. Called for the evaluation's statistics too."""
        return part.own()

    def ascended(self, step: int, gradient: Callable[[], list[Tensor]]) -> AbstractContextManager[None]:
        """Around the passes of a ghost batch, or of the mini-batch where `ghost` is None: the weights at which their
        gradient is taken. `gradient()` goes through the same passes first and gives their gradient at the present
        weights, an entry for each parameter that is trained: of all workers' samples where `ghost` is None."""
        return nullcontext()

    def perturbed(self, draw: Draw) -> AbstractContextManager[None]:
        """Around each forward and backward pass: the weights it is at."""
        return nullcontext()

    def cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Loss of each sample (`reduction` none: k) or summed (sum: a scalar). logits: k x classes, labels: k."""
        return F.cross_entropy(logits, labels, reduction=reduction)

    def after_step(self, step: int) -> None:
        """After the optimizer's step number `step`, counted from 0."""

    def averaged(self) -> AbstractContextManager[None]:
        """Around an evaluation: the weights that are evaluated and kept."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a continuation needs beside the model, the optimizer and (seed, step)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


EXCLUSIVE = {
    "inputs": "mixes or changes the inputs",
    "ascended": "moves the weights of all passes",
    "perturbed": "moves the weights of each pass",
    "cross_entropy": "changes the loss",
    "averaged": "chooses the weights that are evaluated",
}
"""Places in the step that only one of several smoothings can take, and what one does there."""

MOVING_WEIGHTS = ("ascended", "perturbed")


class Combined(Smoothing):
    """Several smoothings as one: each does what it does at its own places in the step."""

    def __init__(self, parts: Sequence[Smoothing]):
        self._parts = parts
        owner = {place: part for part in parts for place in places(type(part))}
        for place in EXCLUSIVE:
            if place in owner:
                setattr(self, place, getattr(owner[place], place))
        self.ghost = next((part.ghost for part in parts if part.ghost is not None), None)
        self.copies = next((part.copies for part in parts if part.copies > 1), 1)

    @property
    def averages(self) -> bool:
        """Whether other weights are evaluated than are trained."""
        return any("averaged" in places(type(part)) for part in self._parts)

    def after_step(self, step: int) -> None:
        """All of them."""
        for part in self._parts:
            part.after_step(step)

    def state_dict(self) -> dict[str, Any]:
        """Of each part."""
        return {str(place): part.state_dict() for place, part in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of each part."""
        for place, part in enumerate(self._parts):
            part.load_state_dict(state[str(place)])

    def loss_sum(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """Summed loss of a pass: the cross-entropy, with two labels a sample that with the soft label of both."""
        if inputs.other_labels is None or inputs.shares is None:
            return self.cross_entropy(logits, inputs.labels, "sum")
        own = self.cross_entropy(logits, inputs.labels, "none")
        other = self.cross_entropy(logits, inputs.other_labels, "none")
        return (inputs.shares * own + (1 - inputs.shares) * other).sum()


def places(smoothing: type[Smoothing]) -> list[str]:
    """The exclusive places in the step that a smoothing takes."""
    return [place for place in EXCLUSIVE if getattr(smoothing, place) is not getattr(Smoothing, place)]


def averages(name: str) -> bool:
    """Whether with a smoothing other weights are evaluated than are trained."""
    return any("averaged" in places(part) for part in parts_of(name).values())


def names() -> list[str]:
    """The built-in smoothings."""
    return [NONE, *built_in(sys.modules[__name__])]


@remembered
def get(name: str) -> type[Smoothing]:
    """The smoothing of this name, one without `+`.

    Raises:
        MethodError: there is none, or it is no smoothing.
    """
    found = find("smoothing", name, sys.modules[__name__], [NONE])
    if not (inspect.isclass(found) and issubclass(found, Smoothing)):
        kind = found.__name__ if inspect.isclass(found) else f"a {type(found).__name__}"
        raise MethodError(f"smoothing {name} is {kind}, not a subclass of lbstudy.methods.smoothing.Smoothing")
    return found


def split(name: str) -> list[str]:
    """The parts of a smoothing's name: `mixup+noise` has two, `none` has none."""
    return [] if name == NONE else name.split("+")


@remembered
def parts_of(name: str) -> dict[str, type[Smoothing]]:
    """The smoothings that a name combines.

    Raises:
        MethodError: one is not there, or two cannot be combined.
    """
    parts = split(name)
    found = {part: get(part) for part in parts}
    if len(found) < len(parts):
        raise MethodError(f"smoothing {name!r} has one part twice")
    taken: dict[str, str] = {}
    for part, smoothing in found.items():
        for place in places(smoothing):
            rivals = MOVING_WEIGHTS if place in MOVING_WEIGHTS else (place,)
            if other := next((taken[rival] for rival in rivals if rival in taken), None):
                raise MethodError(f"{other} and {part} cannot be combined: each {EXCLUSIVE[place]}")
        taken |= dict.fromkeys(places(smoothing), part)
    return found


def declarations(name: str) -> dict[str, Declaration]:
    """What the parts of a smoothing say about themselves, by their names."""
    return {
        part: Declaration(label=s.label or part.split(":")[-1], source=s.source, numbers=s.Numbers, settings=s.Settings)
        for part, s in parts_of(name).items()
    }


def build(run: RunSpec, model: nn.Module) -> Combined:
    """The run's smoothing."""
    own = {name: declaration.own(run, name) for name, declaration in declarations(run.smoothing).items()}
    return Combined([part(model, *own[name], run.seed) for name, part in parts_of(run.smoothing).items()])
