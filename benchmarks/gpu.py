"""What one GPU makes of lbstudy, without Ray and in one command of less than eight minutes.

train()      images per second of LeNet-5, VGG9 and ResNet-18 at small and large batch: SGD in fp32 and bf16, K-FAC with
             its statistics and inverses at every step and at every 10 and 100, against the loop by hand of `throughput`
smoothings   each, with SGD, against none
graphs       `train()` without CUDA graphs, against with them, which it has from a run's second epoch on
compile      SGD with `compile: true`, against without
processes    several that train LeNet-5 at batch 128 on the GPU at the same time, all together, against one alone
landscape    images per second of forward passes at points of a line
K-FAC        where a step's time goes: benchmarks/kfac.py, in a process of its own

Synthetic 3x32x32 images with crop and flip, as `throughput` has them. A measurement is of a run's second epoch, which
has all images or as many as take `--seconds`; what eight minutes leave no time for is left out, and said. fp32 is
without TF32, see docs/study-file.md.

    uv run python benchmarks/gpu.py            # needs torch, torchvision and the packages of `dependencies`; no Ray
    uv run python benchmarks/gpu.py --smoke    # that it works, on the CPU
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp

from benchmarks import _measuring as measuring
from benchmarks.step import NUMBERS
from benchmarks.throughput import NETWORKS, VALIDATION, augmented, stock, time_plain_loop
from lbstudy.analysis.minima import landscape
from lbstudy.analysis.minima.directions import DirectionSpec
from lbstudy.methods import configure, models, smoothing
from lbstudy.study.run import Budget, DatasetSpec, RunSpec
from lbstudy.training import data, datasets
from lbstudy.training.loop import memory_format
from lbstudy.training.train import train

MINUTES = 7.5
INTERVALS = {"kfac (10, 100)": {"factor_interval": 10, "inverse_interval": 100}, "kfac (1, 1)": {}}
POINTS = 5

Rates = dict[tuple[str, int, str], float | None]
"""Images per second of a network at a batch size in a precision; None where it could not be measured."""


class Bench:
    """The GPU's images, and how one measurement is made."""

    def __init__(self, options: argparse.Namespace):
        self.options, self._began = options, time.perf_counter()
        self._dataset = DatasetSpec(
            name="synthetic", samples=options.samples + VALIDATION, validation_size=VALIDATION,
            augment=("crop", "flip"),
        )  # fmt: skip
        self.images = data.place(datasets.load(self._dataset), self._dataset, 0, options.device)
        self.stock = stock(self.images)

    def run(
        self, model: str, batch: int, steps: int, optimizer: str = "sgd", smooth: str = "none", **keys: Any
    ) -> RunSpec:
        """A run of so many steps; of its keys, `hyper` adds to the usual numbers."""
        known = configure.numbers_of(optimizer, smooth)
        hyper = {name: value for name, value in NUMBERS.items() if name in known} | keys.pop("hyper", {})
        return RunSpec(
            model=NETWORKS[model], dataset=self._dataset, batch_size=batch, optimizer=optimizer, smoothing=smooth,
            hyper=hyper, budget=Budget(steps=steps), **keys,
        )  # fmt: skip

    def rate(self, model: str, batch: int, **keys: Any) -> float:
        """Images per second of `train()`."""
        hyper = keys.pop("hyper", {})

        def of(steps: int) -> float:
            run = self.run(model, batch, 2 * steps, hyper=dict(hyper), **keys)
            return train(run, self.fewer(steps * batch)).last.images_per_second

        return self.warmed(of, batch)

    def fewer(self, samples: int) -> data.ImageData:
        """The images, but so many of them for training."""
        images = self.images.train
        assert images.rows is not None
        return replace(self.images, train=replace(images, labels=images.labels[:samples], rows=images.rows[:samples]))

    def by_hand(self, model: str, batch: int, precision: str) -> float:
        """Images per second of the loop by hand."""
        run = self.run(model, batch, 1, precision=precision)

        def of(steps: int) -> float:
            def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                layout = memory_format(self.images.device, run.precision)
                return islice(augmented(self.images, self.stock, batch, layout), steps)

            return batch * steps / time_plain_loop(run, self.images, batches).wall

        return self.warmed(of, batch)

    def warmed(self, of: Callable[[int], float], batch: int) -> float:
        """A rate that depends on the steps it is measured over: of a few, which warm up, and of as many as there is
        time for."""
        whole = len(self.images.train) // batch
        warm = of(min(3, whole))
        return of(min(whole, max(3, round(self.options.seconds * warm / batch))))

    def has_time(self, what: str) -> bool:
        """Whether the eight minutes are not yet over; says what is left out if they are."""
        if self.options.smoke or time.perf_counter() - self._began < 60 * MINUTES:
            return True
        print(f"no time left for {what}", flush=True)
        return False


def compare(
    bench: Bench, name: str, measure: Callable[[], float], reference: float | None = None, against: str = ""
) -> float | None:
    """Print a rate and, where there is one, its ratio to another; None where there is no time or memory for it."""
    if not bench.has_time(name):
        return None
    try:
        rate = measure()
    except torch.OutOfMemoryError:
        print(f"no memory for {name}", flush=True)
        return None
    measuring.show(name, rate, "images/s")
    if reference is not None:
        measuring.show(name, rate / reference, "times as fast", against)
    return rate


def measure_networks(bench: Bench) -> Rates:
    """`train()` with SGD and K-FAC, and the loop by hand; gives SGD's rates."""
    rates: Rates = {}
    for model, batch in product(bench.options.model, bench.options.batch):
        label = f"{model} at {batch}"
        for precision in ("fp32", "bf16"):
            hand = compare(bench, f"{label}, {precision}: by hand", partial(bench.by_hand, model, batch, precision))
            ours = partial(bench.rate, model, batch, precision=precision)
            rates[model, batch, precision] = compare(bench, f"{label}, {precision}: sgd", ours, hand, "by hand")
        for name, intervals in INTERVALS.items():
            ours = partial(bench.rate, model, batch, optimizer="kfac", hyper=intervals)
            compare(bench, f"{label}, fp32: {name}", ours, rates[model, batch, "fp32"], "sgd")
    return rates


def measure_smoothings(bench: Bench, rates: Rates) -> None:
    """Each smoothing, at the smallest batch, where it costs most."""
    model, batch = bench.options.model[0], bench.options.batch[0]
    for name in smoothing.names():
        if name != smoothing.NONE:
            label = f"{model} at {batch}, fp32: sgd with {name}"
            compare(bench, label, partial(bench.rate, model, batch, smooth=name), rates[model, batch, "fp32"], "none")


def measure_graphs(bench: Bench, rates: Rates) -> None:
    """Passes whose kernels the host starts one by one."""
    for model, batch, precision in product(bench.options.model, bench.options.batch, ("fp32", "bf16")):
        label = f"{model} at {batch}, {precision}: sgd, no graphs"
        with mock.patch("lbstudy.training.graphs.DEVICES", ()):
            ours = partial(bench.rate, model, batch, precision=precision)
            compare(bench, label, ours, rates[model, batch, precision], "graphs")


def measure_compiled(bench: Bench, rates: Rates) -> None:
    """torch.compile, at the smallest batch."""
    for model in bench.options.model:
        batch = bench.options.batch[0]
        label = f"{model} at {batch}, fp32: sgd, compiled"
        compare(bench, label, partial(bench.rate, model, batch, compile=True), rates[model, batch, "fp32"], "graphs")


def train_beside_others(rank: int, options: argparse.Namespace, together: Any, rates: Any) -> None:
    """One of several processes on the GPU."""
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    steps = len(bench.images.train) // options.batch[0]
    run = bench.run(options.model[0], options.batch[0], 2 * steps)
    train(run, bench.images)
    together.wait()
    rates.put(train(run, bench.images).last.images_per_second)


def measure_processes(bench: Bench) -> None:
    """Several processes on the GPU at the same time."""
    options = bench.options
    options = argparse.Namespace(**{**vars(options), "samples": min(options.samples, 256 * options.batch[0])})
    context = mp.get_context("spawn")

    def together(count: int) -> float:
        rates: Any = context.SimpleQueue()
        mp.start_processes(
            train_beside_others, (options, context.Barrier(count), rates), nprocs=count, start_method="spawn"
        )
        return sum(rates.get() for _ in range(count))

    alone = None
    for count in options.processes:
        label = f"{options.model[0]} at {options.batch[0]}, fp32: {count} process{'es' * (count > 1)}"
        rate = compare(bench, label, partial(together, count), alone, "1 process")
        alone = alone or rate


def measure_landscape(bench: Bench) -> None:
    """Forward passes at points of a line, three times; the first warms up."""
    images = bench.images

    def rate(model: str) -> float:
        network = models.build(NETWORKS[model].name, images.shape, images.classes, None, NETWORKS[model].settings)
        network = network.to(bench.options.device).eval()
        points = landscape.line(network, DirectionSpec(seed=0), directions=1, a=landscape.grid(-1, 1, POINTS))
        prepared = landscape.prepare(network, images)
        seconds = []
        for _ in range(3):
            watch = measuring.Stopwatch()
            landscape.evaluate_points(network, points, prepared)
            seconds.append(watch.seconds().wall)
        return POINTS * (len(images.train) + len(images.test)) / median(seconds[1:])

    for model in bench.options.model:
        compare(bench, f"{model}, fp32: landscape", partial(rate, model))


def measure_kfac(bench: Bench) -> None:
    """Where the time of K-FAC's steps goes."""
    for model in bench.options.model[:2]:
        if bench.has_time(f"K-FAC's split of {model}"):
            sizes = [str(batch) for batch in bench.options.batch]
            rest = ["--smoke"] if bench.options.smoke else ["--batch", *sizes, "--device", bench.options.device]
            script = str(Path(__file__).with_name("kfac.py"))
            subprocess.run([sys.executable, script, "--model", model, *rest], check=True)


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, threads=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=list(NETWORKS), nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--samples", type=int, default=65_536, help="training images, all on the GPU")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement, about")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="at the same time")
    options = parser.parse_args()
    if options.smoke:
        options.device, options.model, options.batch, options.samples = "cpu", ["lenet5"], [16], 32
        options.seconds, options.processes, options.threads = 0.0, [1, 2], 1
    measuring.begin(options)
    bench = Bench(options)
    rates = measure_networks(bench)
    measure_graphs(bench, rates)
    measure_smoothings(bench, rates)
    measure_landscape(bench)
    measure_processes(bench)
    measure_kfac(bench)
    if not options.smoke:  # half a minute for each network
        measure_compiled(bench, rates)


if __name__ == "__main__":
    main()
