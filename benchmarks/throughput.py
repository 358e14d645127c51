"""Images per second of `train()` in lbstudy/training, one worker and no Ray, against other ways to train a network.

train()     lbstudy: uint8 images on the device; order, crop and flip anew in every epoch
by hand     the same work in one loop with all of torch's means for it: memory format, fused update, and the precision
            and compilation of train(); no loss or gradient norm kept, nothing that resumes
bare        the same model, optimizer and steps on tensors that are ready and normalised, with nothing around them: the
            most that any loop can reach
contiguous  train() with the network's weights in torch's usual memory format
DataLoader  what one would write otherwise: torch's DataLoader and torchvision's RandomCrop(32, padding=4),
            RandomHorizontalFlip, ToTensor, Normalize over the same images; with no loading process of its own, and
            with one, which has a CPU to itself where one is free

All train on synthetic 3x32x32 images, one epoch of a fixed number of steps per round, once for each precision and with
`--compile` compiled besides. Model building, validation and the start of the loading process are outside the timer. The
contestants take turns within a round, for a machine's load changes; a ratio is the median of the ratios within each
round, on CPUs of the CPU time, but of the wall time where a loading process takes part.

    uv run python benchmarks/throughput.py                            # half an hour of a free core
    uv run python benchmarks/throughput.py --model lenet5 --batch 128 # a minute
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import _measuring as measuring
from lbstudy.methods import models, optimizers
from lbstudy.parallel.device import exact_kernels
from lbstudy.study.run import Budget, DatasetSpec, ModelSpec, RunSpec
from lbstudy.training import data, datasets
from lbstudy.training.loop import autocast, memory_format
from lbstudy.training.train import train

VALIDATION = 10  # samples; validation is not timed, so no more than a stratified split needs
RESNET18 = ModelSpec.model_validate({"name": "torchvision:resnet18", "stem": "small"})
NETWORKS = {"lenet5": ModelSpec(name="lenet5"), "vgg9": ModelSpec(name="vgg9"), "resnet18": RESNET18}


class Case(NamedTuple):
    """A network and a batch size, and how much of it is timed."""

    model: str
    batch_size: int
    steps: int  # of a round
    rounds: int
    loaders: bool = False  # whether the ways with a DataLoader take part


CASES = [
    Case("lenet5", 128, 60, 7, loaders=True),
    Case("lenet5", 2048, 4, 7),
    Case("vgg9", 128, 2, 5),
    Case("vgg9", 2048, 1, 1),
    Case("resnet18", 128, 1, 3),
]
SMOKE = [Case("lenet5", 16, 2, 1, loaders=True)]


def run_spec(case: Case, precision: str = "fp32", compiled: bool = False) -> RunSpec:
    """One epoch of `steps` steps with crop and flip."""
    samples = case.batch_size * case.steps + VALIDATION
    return RunSpec(
        model=NETWORKS[case.model],
        dataset=DatasetSpec(
            name="synthetic", samples=samples, validation_size=VALIDATION, augment=("crop", "flip")
        ),
        batch_size=case.batch_size,
        optimizer="sgd",
        hyper={"learning_rate": 0.01, "weight_decay": 1e-4},
        precision=precision,  # type: ignore[arg-type]
        compile=compiled,
        budget=Budget(epochs=1),
    )  # fmt: skip


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


def time_train(run: RunSpec, images: data.ImageData) -> measuring.Seconds:
    """Of its whole mini-batch loop, without validation: from the first look at an epoch's clock to the next."""
    readings: list[measuring.Seconds] = []

    def read() -> float:
        readings.append(measuring.Seconds(time.perf_counter(), time.process_time()))
        return readings[-1].wall

    with mock.patch("lbstudy.training.train.time", SimpleNamespace(perf_counter=read)):
        train(run, images)
    begin, end = readings[:2]
    return measuring.Seconds(end.wall - begin.wall, end.cpu - begin.cpu)


def time_contiguous(run: RunSpec, images: data.ImageData) -> measuring.Seconds:
    """The same with weights in the contiguous format."""
    with mock.patch("lbstudy.training.loop.memory_format", return_value=torch.contiguous_format):
        return time_train(run, images)


def stock(images: data.ImageData) -> Tensor:
    """The training images padded and followed by their mirror images, as whoever has the memory holds them ready."""
    padded = pad(images.train.at(slice(None)), [data.PAD] * 4)
    return torch.cat([padded, padded.flip(-1)])


def augmented(
    images: data.ImageData, ready: Tensor, batch_size: int, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's mini-batches, shuffled, cropped and flipped on the device out of the `stock`, in the fewest operations
    known, and normalised in the convolutions' format."""
    device, count = images.mean.device, len(images.train)
    windows = ready.unfold(2, 32, 1).unfold(3, 32, 1)
    order = torch.randperm(count, device=device)
    flips, tops, lefts = (torch.randint(high, (count,), device=device) for high in (2, 9, 9))
    parts = (t.split(batch_size) for t in (order + count * flips, tops, lefts, images.train.labels[order]))
    for index, top, left, labels in zip(*parts, strict=True):
        yield images.normalise(windows[index, :, top, left], torch.float32, layout), labels


@exact_kernels()
def time_plain_loop(
    run: RunSpec, images: data.ImageData, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
) -> measuring.Seconds:
    """Of a plain training loop over these mini-batches, in the fastest memory format and with a fused update; on a GPU
    with the arithmetic of `train()`."""
    device = images.mean.device
    torch.manual_seed(run.seed)
    model = models.build(run.model.name, images.shape, images.classes, None, run.model.settings)
    model = model.to(device, memory_format=memory_format(device, run.precision)).train()
    network = torch.compile(model) if run.compile else model
    optimizer = optimizers.build(run, model)
    for group in optimizer.param_groups:
        group["fused"] = True
    watch = measuring.Stopwatch()
    for inputs, labels in batches():
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with autocast(run.precision, device):
            loss = cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
    next(model.parameters()).sum().item()  # waits for the device
    return watch.seconds()


def contestants(case: Case, run: RunSpec, device: str) -> dict[str, Callable[[], measuring.Seconds]]:
    """Each contestant's round: a function that trains an epoch and returns its seconds."""
    images = data.place(datasets.load(run.dataset), run.dataset, run.split_seed, device)
    assert len(images.train) == case.batch_size * case.steps
    layout = memory_format(images.device, run.precision)
    ready = images.plain(images.train, slice(None), torch.float32, layout).split(case.batch_size)
    bare = list(zip(ready, images.train.labels.split(case.batch_size), strict=True))

    def loader(processes: int) -> DataLoader:
        return DataLoader(
            PILImages(images), case.batch_size, shuffle=True, num_workers=processes,
            persistent_workers=processes > 0, pin_memory=device != "cpu",
        )  # fmt: skip

    ways = {
        "train()": partial(time_train, run, images),
        "by hand": partial(
            time_plain_loop, run, images, partial(augmented, images, stock(images), case.batch_size, layout)
        ),
        "bare": partial(time_plain_loop, run, images, lambda: bare),
    }
    if not run.compile:
        ways["contiguous"] = partial(time_contiguous, run, images)
    if case.loaders and run.precision == "fp32" and not run.compile:
        for processes in (0, 1):
            batches = loader(processes)
            ways[f"DataLoader {processes}"] = partial(time_plain_loop, run, images, lambda batches=batches: batches)
    return ways


def measure(case: Case, precision: str, compiled: bool, rounds: int, device: str) -> None:
    """Print what the contestants came to."""
    run = run_spec(case, precision, compiled)
    seconds = measuring.take_turns(contestants(case, run, device), rounds)
    label = f"{case.model} at {case.batch_size}, {precision}{', compiled' if compiled else ''}"
    images = case.batch_size * case.steps
    for name, taken in seconds.items():
        measuring.show(f"{label}: {name}", images / median(s.wall for s in taken), "images/s of wall time")
    for name in seconds:
        if name != "train()":
            clock = "wall" if device != "cpu" or name == "DataLoader 1" else "cpu"
            ours, theirs = ([getattr(s, clock) for s in seconds[way]] for way in ("train()", name))
            measuring.show(f"{label}: train()", measuring.ratio(theirs, ours), f"times as fast ({clock} time)", name)


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--model", choices=list(NETWORKS), help="this network alone")
    parser.add_argument("--batch", type=int, help="this batch size alone")
    parser.add_argument("--rounds", type=int, help="default: 1 to 7, by how long one takes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="with torch.compile besides")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    measuring.begin(options)
    for case in SMOKE if options.smoke else CASES:
        if options.model in (None, case.model) and options.batch in (None, case.batch_size):
            for precision in options.precision:
                for compiled in (False, True) if options.compile else (False,):
                    measure(case, precision, compiled, options.rounds or case.rounds, options.device)


if __name__ == "__main__":
    main()
