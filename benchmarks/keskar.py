"""Keskar's measure on his network C1 beside what he published: small against large batch, full space against subspaces.

C1 (Keskar et al. 2017, appendix, and the authors' Keras code): [conv 5x5 (64), batch norm, ReLU, max pool 3/2] twice,
dense layers of 384 and 192, each with batch norm, ReLU and dropout 0.5, and the 10 classes; pixels from 0 to 1, Adam at
1e-3; small batch 256, large batch 10 % of CIFAR-10's 50,000 training images. Their batch norm takes a batch's own
statistics in evaluation, too (Keras' mode 2), and so does this one. The measures are the product's, on its `Objective`:
L-BFGS-B alone, as published, and the best that it and the climbs found.

The published numbers come from the full network after many epochs on all images, which one core does not do in less
than hours. By default this trains a *stand-in*: a quarter of every width and 5,000 images, with the paper's numbers of
steps in an epoch (batches of 26 and 500). So only ratios can be compared: full space to subspace, large to small batch.

    uv run python benchmarks/keskar.py --data ROOT                                          # 10 minutes of a free core
    uv run python benchmarks/keskar.py --data ROOT --width 1 --images 50000 --epochs 100    # the paper's, for a GPU
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import _measuring as measuring
from lbstudy.analysis.minima.keskar import keskar, random_subspace
from lbstudy.analysis.minima.objective import Objective
from lbstudy.parallel.randomness import stream
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets
from lbstudy.training.data import Images, place

SHARES = {"SB": 256 / 50_000, "LB": 0.1}
EPSILONS = (1e-3, 5e-4)
DIMENSION = 100
PUBLISHED = {
    ("full", 1e-3): (28.6, 707.0), ("full", 5e-4): (7.08, 227.0),
    ("subspace", 1e-3): (2.18, 137.0), ("subspace", 5e-4): (0.71, 29.5),
}  # fmt: skip
"""(space, epsilon) -> percent at the small and at the large batch: tables 3 and 4, network C1."""


class Values(NamedTuple):
    """Keskar's measure of one network in one box, in percent."""

    published: float  # L-BFGS-B alone; mean over draws of the subspace
    best: float  # with climbs
    error: float  # standard error of `published` over draws; NaN in the full space


def c1(width: float) -> nn.Module:
    """The network, with so much of its width."""
    maps, first, second = (int(size * width) for size in (64, 384, 192))

    def convolution(channels: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(maps, track_running_stats=False)
        return [nn.Conv2d(channels, maps, 5, padding=2), norm, nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]

    def dense(inputs: int, outputs: int) -> list[nn.Module]:
        norm = nn.BatchNorm1d(outputs, track_running_stats=False)
        return [nn.Linear(inputs, outputs), norm, nn.ReLU(), nn.Dropout(0.5)]

    network = nn.Sequential(
        *convolution(3), *convolution(maps), nn.Flatten(), *dense(maps * 8 * 8, first), *dense(first, second),
        nn.Linear(second, 10),
    )  # fmt: skip
    return network.to(memory_format=torch.channels_last)


def pixels(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a random order, their pixels from 0 to 1, and labels."""
    chosen = torch.from_numpy(stream(0, "subset").permutation(len(images))[:count])
    x = images.at(chosen).float().div(255).contiguous(memory_format=torch.channels_last)
    return x, images.labels[chosen]


def train(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, epochs: int) -> None:
    """Adam, as Keras has it by default."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)
    model.train()
    for epoch in range(epochs):
        order = torch.from_numpy(stream(0, "order", epoch).permutation(len(x)))
        for part in order.split(batch_size):
            if len(part) > 1:  # batch norm has no statistics of a single image
                optimizer.zero_grad()
                cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode, in batches of 1000."""
    logits = torch.cat([model.eval()(part) for part in x.split(1000)])
    return float(cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def measure(model: nn.Module, x: Tensor, y: Tensor, draws: int) -> dict[tuple[str, float], Values]:
    """Keskar's measure in the full space and in subspaces."""
    objective = Objective(model, x, y, batch_size=1000)
    at_x = objective.value_and_gradient(objective.x)
    found: dict[tuple[str, float], Values] = {}
    at = partial(keskar, objective.value_and_gradient, objective.x, at_x=at_x)
    for epsilon in EPSILONS:
        best, published = at(epsilon, stream(0, "sharpness", "keskar"))
        found["full", epsilon] = Values(published, best, np.nan)
        of_draws = []
        for index in range(draws):
            subspace = random_subspace(len(objective.x), DIMENSION, stream(0, "sharpness", "subspace", index))
            of_draws.append(at(epsilon, stream(0, "sharpness", "keskar", index), subspace, climbs=1))
        best, published = np.mean(of_draws, axis=0)
        error = np.std([value.published for value in of_draws], ddof=1) / np.sqrt(draws)
        found["subspace", epsilon] = Values(published, best, error)
    return found


def show(found: dict[str, dict[tuple[str, float], Values]]) -> None:
    """The measures and their ratios, beside the published ones."""
    for (space, epsilon), theirs in PUBLISHED.items():
        for (name, values), other in zip(found.items(), theirs, strict=True):
            value = values[space, epsilon]
            error = "" if np.isnan(value.error) else f" +- {value.error:.2g}"
            shown = f"{value.published:.3g}{error} [{value.best:.3g}]"
            measuring.show(f"{name}, {space}, {epsilon:g}: L-BFGS-B [and climbs]", shown, "%", f"paper: {other:g}")
    for epsilon in EPSILONS:
        for index, name in enumerate(found):
            here = found[name]["full", epsilon].published / found[name]["subspace", epsilon].published
            there = PUBLISHED["full", epsilon][index] / PUBLISHED["subspace", epsilon][index]
            measuring.show(f"{name}, {epsilon:g}: full space", here, "times subspace", f"paper: {there:.3g}")
        for space in ("full", "subspace"):
            here = found["LB"][space, epsilon].published / found["SB"][space, epsilon].published
            there = PUBLISHED[space, epsilon][1] / PUBLISHED[space, epsilon][0]
            measuring.show(f"LB, {space}, {epsilon:g}", here, "times SB", f"paper: {there:.3g}")


def main() -> None:
    """Train, measure, print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data", help="CIFAR-10: torchvision's files or an image tree; default: the user's cache")
    parser.add_argument("--width", type=float, default=0.25, help="of the network; 1: the paper's")
    parser.add_argument("--images", type=int, default=5_000, help="to train on; 50000: the paper's")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--samples", type=int, default=1_000, help="training images that sharpness is measured on")
    parser.add_argument("--draws", type=int, default=5, help="of the subspace")
    options = parser.parse_args()
    dataset = DatasetSpec(name="cifar10", root=options.data)
    if options.smoke:
        options.width, options.images, options.epochs, options.samples, options.draws = 0.05, 400, 1, 20, 2
        dataset = DatasetSpec(name="synthetic", samples=500)
    measuring.begin(options)
    data = place(datasets.load(dataset), dataset, 0, train_on="all")
    (x, y), (test_x, test_y) = pixels(data.train, options.images), pixels(data.test, len(data.test))
    found = {}
    for name, share in SHARES.items():
        began, batch_size = time.perf_counter(), round(share * len(x))
        torch.manual_seed(0)  # both batch sizes begin at the same weights
        model = c1(options.width)
        train(model, x, y, batch_size, options.epochs)
        trained = time.perf_counter()
        (loss, correct), (_, test) = accuracy(model, x, y), accuracy(model, test_x, test_y)
        found[name] = measure(model, x[: options.samples], y[: options.samples], options.draws)
        print(
            f"{name}: batch {batch_size} of {len(x)}, {options.epochs} epochs, width {options.width:g}; train loss "
            f"{loss:.4f}, accuracy {correct:.4f}, test {test:.4f}; {trained - began:.0f} s to train, "
            f"{time.perf_counter() - trained:.0f} s to measure",
            flush=True,
        )
    show(found)


if __name__ == "__main__":
    main()
