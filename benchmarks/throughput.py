"""Images per second of `train()` in lbstudy/training, one worker and no Ray, against two other ways to train a network.

bare        the same model, optimizer and steps on tensors that are ready and normalised, with nothing around
            them, in the memory format that is fastest: the most that any loop can reach; no order, no augmentation,
            no loss or gradient norm kept
train()     lbstudy: uint8 images on the device; order, crop and flip anew in every epoch
contiguous  the same with the network's weights in torch's usual memory format
DataLoader  what one would write otherwise: torch's DataLoader and torchvision's RandomCrop(32, padding=4),
            RandomHorizontalFlip, ToTensor, Normalize over the same images; with no loading process of its own, and
            with one, which has a CPU to itself where one is free

All train on synthetic 3x32x32 images, one epoch of a fixed number of steps per round. Model building, validation and
the start of the loading process are outside the timer. The contestants take turns within a round, for a machine's load
changes; a ratio is the median of the ratios within each round. The first round warms up and does not count.

    uv run python benchmarks/throughput.py            # some minutes
    uv run python benchmarks/throughput.py --quick    # LeNet-5 at batch 128 alone, less than a minute
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, get_args
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lbstudy.methods import models, optimizers
from lbstudy.study.run import Budget, DatasetSpec, ModelSpec, RunSpec
from lbstudy.training import data, datasets
from lbstudy.training.loop import autocast, memory_format
from lbstudy.training.train import train

Precision = Literal["fp32", "bf16"]
VALIDATION = 10  # samples; validation is not timed, so no more than a stratified split needs


class Case(NamedTuple):
    """A network and a batch size, and how much of it is timed."""

    model: str
    batch_size: int
    steps: int  # of a round
    rounds: int

    def run_spec(self, precision: Precision) -> RunSpec:
        """One epoch of `steps` steps with crop and flip."""
        samples = self.batch_size * self.steps + VALIDATION
        dataset = DatasetSpec(name="synthetic", samples=samples, validation_size=VALIDATION, augment=("crop", "flip"))
        return RunSpec(
            model=ModelSpec(name=self.model),
            dataset=dataset,
            batch_size=self.batch_size,
            optimizer="sgd",
            hyper={"learning_rate": 0.01, "weight_decay": 1e-4},
            precision=precision,
            budget=Budget(epochs=1),
        )


CASES = [
    Case("lenet5", 128, 60, 11),
    Case("lenet5", 2048, 4, 11),
    Case("vgg9", 128, 3, 3),
    Case("vgg9", 1024, 1, 3),
]


class PILImages(Dataset):
    """The training images as torchvision's CIFAR-10 gives them: one PIL image at a time, then the transforms."""

    def __init__(self, images: data.ImageData):
        self._pixels = images.train.at(slice(None)).cpu().numpy().transpose(0, 2, 3, 1).copy()
        self._labels = images.train.labels.tolist()
        mean, std = (images.mean / 255).tolist(), (images.std / 255).tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def time_train(run: RunSpec, images: data.ImageData) -> float:
    """Images per second as train() reports them: its whole mini-batch loop, without validation."""
    return train(run, images).last.images_per_second


def time_contiguous(run: RunSpec, images: data.ImageData) -> float:
    """The same with weights in the contiguous format."""
    with mock.patch("lbstudy.training.train.memory_format", return_value=torch.contiguous_format):
        return time_train(run, images)


def time_plain_loop(run: RunSpec, images: data.ImageData, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Images per second of a plain training loop over these mini-batches."""
    device = images.mean.device
    torch.manual_seed(run.seed)
    model = models.build(run.model.name, images.shape, images.classes).to(
        device, memory_format=memory_format(device, run.precision)
    )
    optimizer = optimizers.build(run, model)
    model.train()
    samples, began = 0, time.perf_counter()
    for inputs, labels in batches:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with autocast(run.precision, device):
            loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        samples += len(labels)
    next(model.parameters()).sum().item()  # waits for the device
    return samples / (time.perf_counter() - began)


def contestants(case: Case, precision: Precision, device: str) -> dict[str, Callable[[], float]]:
    """Each contestant's round: a function that trains an epoch and returns images per second."""
    run = case.run_spec(precision)
    images = data.place(datasets.load(run.dataset), run.dataset, run.split_seed, device)
    assert len(images.train) == case.batch_size * case.steps
    ready = images.plain(images.train, slice(None), torch.float32).split(case.batch_size)
    bare = list(zip(ready, images.train.labels.split(case.batch_size), strict=True))

    def loader(processes: int) -> DataLoader:
        return DataLoader(
            PILImages(images), case.batch_size, shuffle=True, num_workers=processes,
            persistent_workers=processes > 0, pin_memory=device != "cpu",
        )  # fmt: skip

    loaders = {f"DataLoader {processes}": loader(processes) for processes in (0, 1)}
    loops = {name: lambda batches=batches: time_plain_loop(run, images, batches) for name, batches in loaders.items()}
    return {
        "bare": lambda: time_plain_loop(run, images, bare),
        "train()": lambda: time_train(run, images),
        "contiguous": lambda: time_contiguous(run, images),
        **loops,
    }


def measure(case: Case, precision: Precision, rounds: int, device: str) -> dict[str, list[float]]:
    """Images per second of each contestant in each round."""
    trains = contestants(case, precision, device)
    speeds: dict[str, list[float]] = {name: [] for name in trains}
    for number in range(rounds + 1):
        order = list(trains) if number % 2 else list(reversed(trains))
        for name in order:
            speed = trains[name]()
            if number:  # round 0 warms up
                speeds[name].append(speed)
    return speeds


def machine(device: str) -> str:
    """What the numbers were measured on."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="LeNet-5 at batch 128 alone")
    parser.add_argument("--rounds", type=int, help="default: 11 of LeNet-5, 3 of VGG9")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 as in a Ray worker with one CPU")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(
        f"{machine(options.device)}; torch {torch.__version__}, threads {options.threads}, {options.precision}; "
        f"{date.today()}"
    )
    print("images per second, crop and flip, SGD: medians; DataLoader n: with n loading processes")
    names = ("bare", "train()", "contiguous", "DataLoader 0", "DataLoader 1")
    ratios = ("/ bare", "/ contiguous", "/ best DataLoader")
    print(f"{'':14}{''.join(f'{name:>14}' for name in names)}   train(){''.join(f'{r:>19}' for r in ratios)}   rounds")
    for case in CASES:
        if options.quick and case != CASES[0]:
            continue
        rounds = options.rounds or case.rounds
        speeds = measure(case, options.precision, rounds, options.device)
        loader = max(names[3:], key=lambda name: median(speeds[name]))
        shares = [
            median(ours / theirs for ours, theirs in zip(speeds["train()"], speeds[other], strict=True))
            for other in ("bare", "contiguous", loader)
        ]
        row = "".join(f"{median(speeds[name]):14.0f}" for name in names)
        label = f"{case.model} b{case.batch_size}"
        print(f"{label:14}{row}          {''.join(f'{share:19.2f}' for share in shares)}{rounds:9}", flush=True)


if __name__ == "__main__":
    main()
