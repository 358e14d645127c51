"""Images per second of a loss landscape, against a plain way to compute one and against bare forward passes.

bare        the forward passes and the cross-entropy alone, over the batches that ours uses, normalised and resident:
            the most that any way can reach; weights never change
ours        lbstudy.analysis.minima.landscape: the images prepared once, then evaluate_points()
DataLoader  what one would write otherwise: at every point load_state_dict() with the moved weights, and a DataLoader
            with torchvision's ToTensor and Normalize over PIL images, 128 a batch; with no loading process of its own,
            and with one, which has a CPU to itself where one is free

All go over the same points of one line, training and test images. The contestants take turns within a round, for a
machine's load changes; a ratio is the median of the ratios within each round. The first round warms up and does not
count; before it, the losses of ours and of the plain way are held against each other.

    uv run python benchmarks/landscape.py             # synthetic images, some minutes
    uv run python benchmarks/landscape.py --data DIR  # CIFAR-10: torchvision's files or an image tree
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import transforms

from benchmarks import _measuring as measuring
from lbstudy.analysis.minima import landscape
from lbstudy.analysis.minima.directions import DirectionSpec, draw
from lbstudy.methods import models
from lbstudy.study.run import DatasetSpec
from lbstudy.training import data, datasets

SPEC = DirectionSpec(seed=123)


class Case(NamedTuple):
    """A network, and how much of a landscape is timed."""

    model: str
    samples: int  # of training and test set together
    points: int
    rounds: int


CASES = [Case("lenet5", 4000, 5, 11), Case("vgg9", 500, 3, 3)]
SMOKE = [Case("lenet5", 50, 2, 1)]


class PILImages(Dataset):
    """Images as torchvision's CIFAR-10 gives them: one PIL image at a time, then the transforms."""

    def __init__(self, images: data.Images, mean: Tensor, std: Tensor):
        self._pixels = images.at(slice(None)).cpu().numpy().transpose(0, 2, 3, 1).copy()
        self._labels = images.labels.tolist()
        self._transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean / 255).tolist(), (std / 255).tolist())]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def ours(model: nn.Module, images: data.ImageData, points: landscape.Points) -> list[float]:
    """Mean loss over training and test images at each point."""
    result = landscape.evaluate_points(model, points, landscape.prepare(model, images))
    train, test = len(images.train), len(images.test)
    return ((train * result["train_loss"] + test * result["test_loss"]) / (train + test)).tolist()


@torch.no_grad()
def plain(model: nn.Module, loader: DataLoader, points: landscape.Points) -> list[float]:
    """The same by the plain way."""
    device = next(model.parameters()).device
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    direction = draw(model, SPEC, 0)
    losses = []
    for a in points.coordinates["a"]:
        moved = {name: tensor + a * direction[name] if name in direction else tensor for name, tensor in state.items()}
        model.load_state_dict(moved)
        model.eval()
        loss = correct = samples = 0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(inputs)
            loss += cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            samples += len(labels)
        losses.append(loss / samples)
    model.load_state_dict(state)
    return losses


@torch.inference_mode()
def bare(model: nn.Module, batches: landscape.Batches, points: landscape.Points) -> None:
    """Forward passes and cross-entropy, as often as there are points."""
    for _ in range(len(points.coordinates)):
        for inputs, labels in batches:
            loss = cross_entropy(model(inputs), labels, reduction="sum")
    loss.item()  # waits for the device


def measure(case: Case, images: data.ImageData, rounds: int) -> dict[str, list[float]]:
    """Images per second of each contestant in each round."""
    device = images.mean.device
    torch.manual_seed(0)
    model = models.build(case.model, images.shape, images.classes).to(device).eval()
    points = landscape.line(model, SPEC, directions=1, a=landscape.grid(-1, 1, case.points))
    prepared = landscape.prepare(model, images)
    pil = ConcatDataset([PILImages(part, images.mean, images.std) for part in (images.train, images.test)])

    ways: dict[str, Callable[[], object]] = {
        "bare": partial(bare, model, [*prepared["train"], *prepared["test"]], points),
        "ours": partial(ours, model, images, points),
    }
    for processes in (0, 1):
        loader = DataLoader(
            pil, 128, num_workers=processes, persistent_workers=processes > 0, pin_memory=device.type != "cpu"
        )
        ways[f"DataLoader {processes}"] = partial(plain, model, loader, points)

    torch.testing.assert_close(ways["ours"](), ways["DataLoader 0"](), rtol=1e-3, atol=1e-3)
    passes = case.points * (len(images.train) + len(images.test))

    def speed(way: Callable[[], object]) -> float:
        began = time.perf_counter()
        way()
        return passes / (time.perf_counter() - began)

    return measuring.take_turns({name: partial(speed, way) for name, way in ways.items()}, rounds)


def place(case: Case, root: Path | None, device: str) -> data.ImageData:
    """So many images, 4 of 5 for training."""
    test = case.samples // 5
    spec = DatasetSpec(name="synthetic", samples=4 * case.samples)  # with a quarter as many test images
    if root is not None:
        spec = DatasetSpec(name="cifar10", root=str(root))
    images = data.place(datasets.load(spec), spec, 0, device)

    def first(part: data.Images, count: int) -> data.Images:
        return data.Images(part.at(slice(count)), part.labels[:count])

    return data.ImageData(
        first(images.train, case.samples - test), images.validation, first(images.test, test),
        images.classes, images.mean, images.std,
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; default: synthetic images")
    parser.add_argument("--rounds", type=int, help="default: 11 of LeNet-5, 3 of VGG9")
    parser.add_argument("--samples", type=int, help="training and test images; default: 4000 and 500")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    measuring.begin(options)
    for case in SMOKE if options.smoke else CASES:
        case = case._replace(samples=options.samples or case.samples)
        speeds = measure(case, place(case, options.data, options.device), options.rounds or case.rounds)
        for name, values in speeds.items():
            measuring.show(f"{case.model}: {name}", median(values), "images/s of forward passes")
        loader = max((n for n in speeds if n.startswith("DataLoader")), key=lambda name: median(speeds[name]))
        for other in ("bare", loader):
            measuring.show(
                f"{case.model}: ours", measuring.ratio(speeds["ours"], speeds[other]), "times as fast", other
            )


if __name__ == "__main__":
    main()
