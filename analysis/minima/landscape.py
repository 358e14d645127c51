"""The loss around and between minima: which points of weight space to look at, and how to look at them fast.

A *point* is a vector of coefficients over a few basis vectors; a vector is a network's whole state, parameters and
batch-norm statistics, laid out flat. A point is their weighted sum; from one solution to another, running variances are
a weighted geometric mean instead (see `interpolate`). There are four kinds:

line         theta* + a delta along several random directions (Li et al. 2018; the slides' f(a) = L(theta* + a delta))
plane        theta* + a delta + b eta
interpolate  (1 - a) theta_A + a theta_B, from one solution to another (Goodfellow et al. 2015)
trajectory   the plane through the final weights that holds most of a run's path, by PCA over its checkpoints

`evaluate_points` then does forward passes and next to nothing else: images are normalised once and stay on the device,
and a point costs one pass over the flat state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from lbstudy.analysis.minima.directions import DirectionSpec, draw
from lbstudy.methods import models
from lbstudy.parallel.device import exact_kernels
from lbstudy.parallel.randomness import stream
from lbstudy.study.file import StudyError
from lbstudy.training.data import ImageData, Images

State = Mapping[str, Tensor]
"""A model's `state_dict()`."""

KEPT_IMAGES = 1 << 30
"""Bytes, at most, that the normalised images of a set may take on the device from one point to the next."""


class Batches:
    """Images and their labels, normalised and ready for a model, in batches.

    Args:
        data: gives mean and deviation.
        images: of which these are some.
        parts: the positions of each batch.
        dtype: of the model.
        layout: of images in memory; with the channels last, convolutions on a CPU are 1.4 to 1.5 times as fast.
    """

    def __init__(
        self, data: ImageData, images: Images, parts: Sequence[Tensor], dtype: torch.dtype,
        layout: torch.memory_format,
    ):  # fmt: skip
        self._data, self._images, self._parts, self._dtype, self._layout = data, images, parts, dtype, layout
        self.samples, self.device = sum(map(len, parts)), images.device
        keep = self.samples * prod(data.shape) * dtype.itemsize <= KEPT_IMAGES
        self._kept = list(self._made()) if keep else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._parts:
            yield self._data.plain(self._images, part, self._dtype, self._layout), self._images.labels[part]


# Bytes that the largest layer output of a forward pass may take. On a CPU a pass is fastest while that fits its cache:
# LeNet-5 with some 500 images, VGG9 with 32 (measured). A GPU wants many images at once.
LARGEST_OUTPUT = {"cpu": 8 * 2**20, "cuda": 2**30}


class Variances(NamedTuple):
    """The running variances within a flat state."""

    entries: Tensor  # where they are, int64
    eps: Tensor  # what their layer adds to each before it takes the root, float64


class Points(NamedTuple):
    """Points of weight space, as combinations of basis vectors."""

    coordinates: pd.DataFrame  # a row per point: `a`, `b` where it has two, `direction` where there are several
    coefficients: NDArray[np.float64]  # points x vectors
    basis: Tensor  # vectors x numbers of a flat state
    variances: Variances | None = None  # the entries that are combined as geometric means; None: all are summed


class Trajectory(NamedTuple):
    """A run's path in the plane that holds most of it."""

    points: Points  # a grid around the path
    path: NDArray[np.float64]  # checkpoints x 2, Euclidean distances from the final weights, which are (0, 0)
    explained: NDArray[np.float64]  # share of the checkpoints' variance along each of the two axes


def grid(low: float, high: float, count: int) -> NDArray[np.float64]:
    """Evenly spaced numbers, among which 0 and 1 are exact if they are there at all."""
    return np.linspace(low, high, count).round(12)


LINE = grid(-1, 1, 51)
PLANE = grid(-1, 1, 25)
INTERPOLATION = grid(-0.5, 1.5, 41)  # steps of 0.05, so that both solutions are among the points


def line(model: nn.Module, spec: DirectionSpec, directions: int = 5, a: NDArray[np.float64] = LINE) -> Points:
    """theta* + a delta along each of several directions."""
    basis = [flatten(model.state_dict()), *(_direction(model, spec, index) for index in range(directions))]
    coordinates = pd.DataFrame({"direction": np.repeat(range(directions), len(a)), "a": np.tile(a, directions)})
    coefficients = np.zeros((len(coordinates), directions + 1))
    coefficients[:, 0] = 1
    coefficients[np.arange(len(coordinates)), 1 + coordinates["direction"]] = coordinates["a"]
    return Points(coordinates, coefficients, torch.stack(basis))


def plane(
    model: nn.Module, spec: DirectionSpec, a: NDArray[np.float64] = PLANE, b: NDArray[np.float64] = PLANE
) -> Points:
    """theta* + a delta + b eta: directions 0 and 1, which are independent draws and not made orthogonal."""
    return _plane(flatten(model.state_dict()), _direction(model, spec, 0), _direction(model, spec, 1), a, b)


def interpolate(model: nn.Module, start: State, end: State, a: NDArray[np.float64] = INTERPOLATION) -> Points:
    """From one solution to another: (1 - a) start + a end, weights, running means and all else but running variances.

    A running variance v goes geometrically, for the scale s^2 = v + eps by which its layer divides:
    log s^2 = (1 - a) log s0^2 + a log s1^2. So it is positive for every a, while the straight line of Li et al. 2018
    falls below zero beyond the solutions, where the network then has no output. Scales multiply from layer to layer,
    and logarithms treat growing and shrinking alike. With eps inside, a variance of exactly 0 (a dead channel) needs no
    floor; where the result less eps would be negative, the variance is 0.

    At a = 0 and a = 1 the point is the solution, to the bit.

    Args:
        model: a network of the solutions' architecture: which entries are running variances, and each layer's eps.
        start, end: the solutions.
        a: where to look.
    """
    basis = torch.stack([flatten(start), flatten(end)])
    return Points(pd.DataFrame({"a": a}), np.column_stack([1 - a, a]), basis, _running_variances(model))


def trajectory(model: nn.Module, checkpoints: Sequence[State], count: int = 25, margin: float = 0.2) -> Trajectory:
    """The first two principal axes of a run's checkpoints, and a grid of `count` x `count` points around its path.

    Axes are of the parameters alone; batch-norm statistics stay those of the final state all over the plane.

    Args:
        model: a network of the run's architecture.
        checkpoints: states in their order, the final one last.
        count: points along either axis.
        margin: how far the grid goes beyond the path, as a share of the path's extent.

    Raises:
        StudyError: too few checkpoints for two axes, or one that is not finite.
    """
    if len(checkpoints) < 3:
        raise StudyError(f"trajectory: {len(checkpoints)} checkpoints; its plane needs at least 3")
    parameters = {name for name, _ in model.named_parameters()}
    moving = flatten({n: torch.full_like(t, n in parameters) for n, t in checkpoints[-1].items()}).bool()
    states = torch.stack([flatten(state) for state in checkpoints])
    moves = torch.where(moving, states - states[-1], 0).double().cpu().numpy()
    if not np.isfinite(moves).all():
        raise StudyError("trajectory: a checkpoint holds numbers that are not finite; its run diverged")
    _, singular, axes = np.linalg.svd(moves - moves.mean(0), full_matrices=False)
    axes = axes[:2] * np.where(moves[0] @ axes[:2].T < 0, -1, 1)[:, None]  # the run starts at positive coordinates
    path = moves @ axes.T
    low, high = path.min(0), path.max(0)
    extent = np.maximum(high - low, 1e-3 * (high - low).max())  # a straight path still has a plane
    a, b = (np.linspace(low[i] - margin * extent[i], high[i] + margin * extent[i], count) for i in range(2))
    first, second = (torch.from_numpy(axis).to(states) for axis in axes)
    return Trajectory(_plane(states[-1], first, second, a, b), path, (singular**2 / (singular**2).sum())[:2])


def prepare(model: nn.Module, data: ImageData, samples: int | None = None, seed: int = 0) -> dict[str, Batches]:
    """The images to evaluate on, `train` and `test`, normalised in batches that suit the model and its device.

    Args:
        model: gives precision and batch size.
        data: on the model's device.
        samples: how many of either set, the first of a permutation by seed; None for all.
        seed: of that permutation.

    Raises:
        StudyError: not even one sample.
    """
    if samples is not None and samples < 1:
        raise StudyError(f"samples: {samples}; a landscape needs at least 1")
    dtype, size = next(model.parameters()).dtype, batch_size(model, data.shape)
    fast = models.works_with_channels_last(model, data.shape)
    layout = torch.channels_last if fast else torch.contiguous_format

    def batches(name: str, images: Images) -> Batches:
        chosen = torch.arange(len(images))
        if samples is not None:
            chosen = torch.from_numpy(stream(seed, "subset", name).permutation(len(images))[:samples])
        return Batches(data, images, chosen.to(images.device).split(size), dtype, layout)

    return {"train": batches("train", data.train), "test": batches("test", data.test)}


@exact_kernels()
@torch.inference_mode()
def evaluate_points(model: nn.Module, points: Points, images: Mapping[str, Batches]) -> pd.DataFrame:
    """Mean cross-entropy and accuracy at each point, in evaluation mode; the model itself is not touched.

    Returns a row per point: its coordinates and, for each set of images NAME, `NAME_loss`, `NAME_accuracy` (0 to 1)
    and `NAME_samples`. Losses that overflow are kept as they are; where a loss is NaN, the accuracy is NaN too.
    """
    network, state = _on_a_flat_state(model)
    basis, results = points.basis.to(state), []
    for coefficients in points.coefficients.tolist():
        # 0 x infinity is NaN: a vector that takes no part must not spoil the point.
        terms = [(c, vector) for c, vector in zip(coefficients, basis, strict=True) if c]
        state.zero_()
        for coefficient, vector in terms:
            state.add_(vector, alpha=coefficient)
        if points.variances is not None and len(terms) > 1:  # a single vector is a solution, and exact as it is
            state[points.variances.entries] = _geometric_mean(terms, points.variances).to(state)
        results.append(torch.cat([_loss_and_accuracy(network, batches) for batches in images.values()]))
    columns = [f"{name}_{metric}" for name in images for metric in ("loss", "accuracy")]
    frame = pd.DataFrame(torch.stack(results).cpu().numpy(), points.coordinates.index, columns)
    for name, batches in images.items():
        frame[f"{name}_samples"] = batches.samples
    return points.coordinates.join(frame)


@torch.inference_mode()
def batch_size(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Images of a forward pass, such that the largest output of a layer just fits what `LARGEST_OUTPUT` allows."""
    network, sizes = copy.deepcopy(model).eval(), []
    for module in network.modules():
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.nbytes))
    image = next(network.parameters()).new_zeros(1, *shape)
    network(image)
    return max(1, LARGEST_OUTPUT[image.device.type] // max(*sizes, image.nbytes))


def flatten(state: State) -> Tensor:
    """All floating-point entries of a state, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in state.values() if tensor.is_floating_point()])


def _direction(model: nn.Module, spec: DirectionSpec, index: int) -> Tensor:
    """A direction as a flat state; it leaves batch-norm statistics where they are."""
    moves = draw(model, spec, index)
    return flatten({n: moves[n] if n in moves else torch.zeros_like(t) for n, t in model.state_dict().items()})


def _running_variances(model: nn.Module) -> Variances:
    """Where a flat state of the model holds the running variances of its batch norms."""
    entries, eps, at = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)], 0
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, tensor in model.state_dict().items():
        owner, _, buffer = name.rpartition(".")
        if owner in layers and buffer == "running_var":
            entries.append(torch.arange(at, at + tensor.numel()))
            eps.append(torch.full((tensor.numel(),), layers[owner].eps, dtype=torch.float64))
        at += tensor.numel() if tensor.is_floating_point() else 0
    device = next(model.parameters()).device
    return Variances(torch.cat(entries).to(device), torch.cat(eps).to(device))


def _geometric_mean(terms: Sequence[tuple[float, Tensor]], variances: Variances) -> Tensor:
    """The running variances of a point between states, float64; see `interpolate`."""
    scales = [coefficient * (vector[variances.entries].double() + variances.eps).log() for coefficient, vector in terms]
    return (torch.stack(scales).sum(0).exp() - variances.eps).clamp(min=0)


def _plane(origin: Tensor, first: Tensor, second: Tensor, a: NDArray[np.float64], b: NDArray[np.float64]) -> Points:
    coordinates = pd.DataFrame({"a": np.repeat(a, len(b)), "b": np.tile(b, len(a))})
    coefficients = np.column_stack([np.ones(len(coordinates)), coordinates["a"], coordinates["b"]])
    return Points(coordinates, coefficients, torch.stack([origin, first, second]))


def _on_a_flat_state(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy of the model in evaluation mode, and the flat state that its parameters and statistics are views of."""
    network = copy.deepcopy(model).eval().requires_grad_(False)
    state = flatten(network.state_dict())
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    owned = [tensors[name] for name, tensor in network.state_dict().items() if tensor.is_floating_point()]
    for tensor, part in zip(owned, state.split([tensor.numel() for tensor in owned]), strict=True):
        tensor.data = part.view_as(tensor)
    return network, state


def _loss_and_accuracy(network: nn.Module, batches: Batches) -> Tensor:
    """Mean loss and accuracy; sums are in double precision and stay on the device, so that nothing waits for them."""
    sums = torch.zeros(2, dtype=torch.float64, device=batches.device)
    for images, labels in batches:
        logits = network(images).double()
        sums[0] += cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    loss, accuracy = sums / batches.samples
    return torch.stack([loss, torch.where(loss.isnan(), loss, accuracy)])
