"""The optimizers of a study: a module each, or torch optimizers of anyone's by dotted name.

A module declares its optimizer as `METHOD = Optimizer(...)`. The training loop asks of what is built only what torch's
optimizers have. It makes use of more where that is there: `train()` and `eval()`, which switch between the weights that
are trained and those that are evaluated (schedule-free methods); `capture(...)`, around every forward and backward pass
(K-FAC's statistics, see `KFAC.capture`); and `fallbacks`, a count for the records.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lbstudy.methods.declaration import Declaration, MethodError, built_in, find, numbers_of, remembered
from lbstudy.study.run import RunSpec, Spec

Course = Callable[[Any, Any, int, int], dict[str, Any]]
"""(numbers, settings, step counted from 0, steps of a milestone's unit) -> entries of the parameter groups."""


def velocity(model: nn.Module) -> list[int]:
    """A number for each of the model's: numbers in each tensor of an optimizer's state, see `Optimizer`."""
    return [parameter.numel() for parameter in model.parameters()]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an optimizer is built from."""

    model: nn.Module
    groups: list[dict[str, Any]]  # its parameters; weight_decay is 0 in the second group where there are two
    learning_rate: float
    numbers: Any  # of the declaration's class
    settings: Any  # likewise
    run: RunSpec

    @property
    def fused(self) -> bool:
        """Whether one of torch's own optimizers shall update in one kernel: on GPUs. CPUs' fused kernels round in
        another way than their others."""
        return all(parameter.is_cuda for parameter in self.model.parameters())

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves out."""
        return [parameter for group in self.groups[1:] for parameter in group["params"]]


@dataclass(frozen=True, kw_only=True)
class Optimizer(Declaration):
    """An optimizer of a study.

    Args:
        build: makes it.
        course: what else than the learning rate changes in the course of a run.
        remembers: how many numbers each tensor of its state holds, of a model; for the size of checkpoints.
    """

    build: Callable[[Recipe], torch.optim.Optimizer]
    course: Course = lambda numbers, settings, step, unit: {}
    remembers: Callable[[nn.Module], list[int]] = lambda model: 2 * velocity(model)


def names() -> list[str]:
    """The built-in optimizers."""
    return built_in(sys.modules[__name__])


@remembered
def get(name: str) -> Optimizer:
    """The optimizer of this name: built in, or by dotted name a declaration, or a torch optimizer of anyone's.

    Raises:
        MethodError: there is none, or it cannot be used.
    """
    found = find("optimizer", name, sys.modules[__name__])
    return found if isinstance(found, Optimizer) else _of_constructor(name, found)


def _of_constructor(name: str, constructor: Any) -> Optimizer:
    """The declaration of `constructor(parameters, lr=..., ...)`; the model is handed over where it asks for `model`."""
    if not callable(constructor):
        raise MethodError(f"optimizer {name} is a {type(constructor).__name__}, not a class or function that makes one")
    try:
        first, *rest = inspect.signature(constructor).parameters
    except ValueError as error:
        raise MethodError(f"optimizer {name} should be called as `(parameters, lr=...)`") from error
    if "lr" not in rest:
        raise MethodError(f"optimizer {name} has no `lr` among its arguments ({', '.join((first, *rest))})")
    numbers, entries = numbers_of(constructor, skip=(first, "lr"))

    def build(recipe: Recipe) -> torch.optim.Optimizer:
        given: dict[str, Any] = {}
        for number, value in recipe.numbers.model_dump().items():
            argument, place = entries.get(number, (number, -1))
            if place < 0:
                given[argument] = value
            else:
                given[argument] = (*given.get(argument, ()), value)
        given |= recipe.settings.model_extra or {}
        optimizer = constructor(recipe.model if first == "model" else recipe.groups, lr=recipe.learning_rate, **given)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise MethodError(f"optimizer {name} gave a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        return optimizer

    return Optimizer(label=name.split(":")[1], source=name, numbers=numbers, settings=Arguments, build=build)


class Arguments(Spec, extra="allow"):
    """Further arguments of a constructor, as they are."""


def build(run: RunSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The run's optimizer.

    Weight decay is of all parameters, batch norm and biases included, as in the sources, or with `weight_decay_of`
    "weights" of those with at least two dimensions alone. What changes in the course of the run, `RunCourse` sets.
    """
    declaration = get(run.optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if run.weight_decay_of == "weights" and "weight_decay" in declaration.numbers.model_fields:
        groups = [{"params": [p for p in parameters if p.ndim > 1]}]
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    numbers, settings = declaration.own(run, run.optimizer)
    rate = float(run.hyper["learning_rate"])
    recipe = Recipe(model=model, groups=groups, learning_rate=rate, numbers=numbers, settings=settings, run=run)
    return declaration.build(recipe)


class RunCourse:
    """What changes in the course of a run: the learning rate, and what the optimizer's declaration says.

    Args:
        optimizer: as `build` made it.
        run: the run.
        steps_per_epoch: of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, run: RunSpec, steps_per_epoch: int):
        self._optimizer, self._run, self._steps_per_epoch = optimizer, run, steps_per_epoch
        self._declaration = get(run.optimizer)
        self._own = self._declaration.own(run, run.optimizer)

    def set(self, step: int) -> float:
        """Prepare optimizer step `step`, counted from 0. Returns the learning rate; a group's may be a multiple,
        `lr_scale`, of it."""
        run = self._run
        rate = run.hyper["learning_rate"] * run.schedule.rate_factor(step, run.budget, self._steps_per_epoch)
        changes = self._declaration.course(*self._own, step, run.budget.unit(self._steps_per_epoch))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
            group.update(changes)
        return rate
