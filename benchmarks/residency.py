"""Photographs that are mapped from a decoded file, against the same in memory and against a `DataLoader`.

    decode      JPEG files of differing sizes to one file of 256 x 256 pixels: seconds per thousand, and again once it
                is there
    memory      the images in the process's own memory, which `dataset.residency: device` comes to on a CPU
    mapped      the same in the decoded file: `dataset.residency: host`
    DataLoader  torchvision's ImageFolder with RandomResizedCrop and RandomHorizontalFlip, which decodes in every epoch,
                in the process itself; the loop around it is written by hand

The three train the same network on 224 x 224 pixels, random_resized_crop and flip, for a few steps a round, in turns:
by default a cheap one, so that the images count, and one without batch norm, whose statistics only we compute afresh.
Ratios are medians of those within the rounds, in CPU time of the process and in wall time; the first round warms up.
Then as many processes as `--workers` says train on the mapped images at the same time. Their memory is told twice,
after the first round and after the last: what each has for itself, and its share of the mapped file, which the system
takes back when memory is short (Linux's Pss_Anon and Pss_File).

    uv run python benchmarks/residency.py                                 # 2,000 photographs, SqueezeNet, some minutes
    uv run python benchmarks/residency.py --model torchvision:resnet50 --photographs 20000  # 4 GB decoded
    uv run python benchmarks/residency.py --smoke                         # tiny: does it run?
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lbstudy.methods import models, optimizers
from lbstudy.study.run import Budget, DatasetSpec, ModelSpec, RunSpec
from lbstudy.training import data, datasets
from lbstudy.training.dataset import Dataset
from lbstudy.training.loop import memory_format
from lbstudy.training.train import train

CLASSES = 10


class Case(NamedTuple):
    """What is trained."""

    model: str
    photographs: int
    pixels: int  # of the decoded images
    crop: int
    batch_size: int
    steps: int  # of a round
    rounds: int

    def run_spec(self, root: Path) -> RunSpec:
        """A round."""
        dataset = DatasetSpec(
            name="image_folder",
            root=str(root),
            image_size=self.pixels,
            image_fit="crop",
            crop_size=self.crop,
            augment=("random_resized_crop", "flip"),
            validation_size=CLASSES,
        )
        return RunSpec(
            model=ModelSpec(name=self.model),
            dataset=dataset,
            batch_size=self.batch_size,
            optimizer="sgd",
            hyper={"learning_rate": 0.01},
            budget=Budget(steps=self.steps),
        )


SMOKE = Case("lenet5", 60, 40, 32, 8, 2, 1)


def make_photographs(root: Path, count: int, pixels: int) -> None:
    """A tree of JPEG files with the short side from 1 to 1.5 times `pixels`; a twentieth tests."""
    draw = np.random.default_rng(0)
    for number in range(count):
        part = "test" if (number >= CLASSES and number % 20 < 1) or number < CLASSES else "train"
        folder = root / part / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        short, long = sorted((pixels * draw.uniform(1, 1.5, 2)).astype(int))
        size = (long, short) if number % 3 else (short, long)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=85)


def memory() -> tuple[float, float]:
    """Megabytes that this process has for itself, and its share of files that are mapped."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    found = {name.rstrip(":"): int(size) / 1000 for name, size, *_ in lines}
    return found["Pss_Anon"], found["Pss_File"]


def time_train(run: RunSpec, images: data.ImageData) -> None:
    """A round of ours."""
    train(run, images)


def time_loader(run: RunSpec, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, classes: int) -> None:
    """A round of a loop written by hand."""
    size = run.dataset.crop_size or 0
    model = models.build(run.model.name, (3, size, size), classes)
    model = model.to(memory_format=memory_format(torch.device("cpu"), run.precision)).train()
    optimizer = optimizers.build(run, model)
    for inputs, labels in islice(batches, steps):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def loader(run: RunSpec, images: data.ImageData) -> DataLoader:
    """What one would write otherwise."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(run.dataset.crop_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((images.mean / 255).tolist(), (images.std / 255).tolist()),
        ]
    )
    folder = ImageFolder(f"{run.dataset.root}/train", transform)
    return DataLoader(folder, run.batch_size, shuffle=True, drop_last=True)


def in_memory(dataset: Dataset) -> Dataset:
    """The same with images that this process has for itself."""
    parts = (np.array(dataset.train_images), dataset.train_labels, np.array(dataset.test_images), dataset.test_labels)
    return Dataset(*parts, dataset.classes, dataset.origin)


def rounds(case: Case, run: RunSpec, mapped: Dataset) -> None:
    """The three in turns."""
    there, here = (data.place(dataset, run.dataset, 0) for dataset in (mapped, in_memory(mapped)))
    batches = cycle(loader(run, here))
    ways: dict[str, Callable[[], None]] = {
        "memory": lambda: time_train(run, here),
        "mapped": lambda: time_train(run, there),
        "DataLoader": lambda: time_loader(run, batches, case.steps, mapped.classes),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(case.rounds + 1):
        for name in list(ways) if number % 2 else list(reversed(ways)):
            cpu, wall = time.process_time(), time.perf_counter()
            ways[name]()
            if number:  # round 0 warms up
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    images = case.batch_size * case.steps
    print(f"{'':12}{'images/CPU s':>14}{'images/s':>12}{'CPU, of mapped':>17}{'wall, of mapped':>18}")
    for name, times in taken.items():
        cpu, wall = (median(column) for column in zip(*times, strict=True))
        ratios = [
            median(its / ours for its, ours in zip(column, mapped_column, strict=True))
            for column, mapped_column in zip(zip(*times, strict=True), zip(*taken["mapped"], strict=True), strict=True)
        ]
        print(f"{name:12}{images / cpu:14.1f}{images / wall:12.1f}{ratios[0]:17.2f}{ratios[1]:18.2f}")


def worker(case: Case, run: RunSpec, dataset: Dataset, barrier: object, answers: object) -> None:
    """Train on the mapped images beside others, and tell the memory after the first and the last round."""
    torch.set_num_threads(1)
    images = data.place(dataset, run.dataset, 0)
    seen = []
    for number in range(case.rounds + 1):
        train(run.model_copy(update={"seed": number}), images)
        barrier.wait()  # type: ignore[attr-defined]
        seen.append(memory())
        barrier.wait()  # type: ignore[attr-defined]
    answers.put((seen[0], seen[-1]))  # type: ignore[attr-defined]


def workers(count: int, case: Case, run: RunSpec, dataset: Dataset) -> None:
    """So many processes beside each other."""
    context = get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = [context.Process(target=worker, args=(case, run, dataset, barrier, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    for first, last in found:
        words = [f"{own:.0f} MB its own, {file:.0f} MB of files" for own, file in (first, last)]
        print(f"of {count} workers: {words[0]}; after {case.rounds} rounds more {words[1]}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=2000)
    parser.add_argument("--model", default="torchvision:squeezenet1_1")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    case = SMOKE if options.smoke else Case(
        options.model, options.photographs, 256, 224, options.batch_size, options.steps, options.rounds
    )  # fmt: skip
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # the decoded file goes with it
        root = Path(folder) / "photographs"
        make_photographs(root, case.photographs, case.pixels)
        run = case.run_spec(root)
        print(f"{case}; torch {torch.__version__}, 1 thread, {os.cpu_count()} CPUs; {date.today()}")
        for words in ("decoded", "found again"):
            began = time.perf_counter()
            dataset = datasets.load(run.dataset)
            print(f"{words}: {(time.perf_counter() - began) / case.photographs * 1000:.3g} s per 1,000 photographs")
        mapped = dataset.settled("host")
        print(f"{mapped.nbytes / 1e6:.0f} MB of images, mapped")
        rounds(case, run, mapped)
        for count in options.workers:
            workers(count, case, run, mapped)


if __name__ == "__main__":
    main()
