"""What a K-FAC step costs beside an SGD step, and beside the same K-FAC done with curvlinops.

    uv run python benchmarks/kfac.py --model lenet5 --batch 128 2048 8192
    uv run python benchmarks/kfac.py --model vgg9 --batch 128 --repeats 3 --device cuda --curvlinops

Each round makes one step of every kind, so a change of the machine's speed meets all alike: SGD; K-FAC that
only preconditions; K-FAC that also updates its factors; K-FAC that also inverts. The table holds medians over the
rounds. A step at intervals (f, i) costs, on the average, preconditioning + factors / f + inversion / i.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import _measuring as measuring
from lbstudy.methods import models
from lbstudy.methods.optimizers.kfac import KFAC, exchange, listener
from lbstudy.methods.optimizers.kfac import optimizer as kfac
from lbstudy.parallel.workers import Workers
from lbstudy.training.data import worker_slice

INTERVALS = ((1, 1), (1, 10), (10, 100))
PHASES = ("factors", "inverse", "precondition", "communication")
TIMED = [  # where the phases are in the optimizer
    (listener.Listener, "_add", "factors"),
    (KFAC, "_update_statistics", "factors"),
    (KFAC, "_update_inverses", "inverse"),
    (KFAC, "_directions", "precondition"),
    (exchange.PendingSum, "__init__", "communication"),
    (exchange.PendingSum, "wait", "communication"),
    (kfac, "share", "communication"),
]


class Stopwatch:
    """Seconds in each phase; a phase within another is not counted in the outer one."""

    def __init__(self, device: torch.device):
        self._device, self._running = device, [0.0]
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the block as this phase."""
        start = self._now()
        self._running.append(0.0)
        try:
            yield
        finally:
            total = self._now() - start
            self.seconds[phase] += total - self._running.pop()
            self._running[-1] += total

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count all calls of this function as the phase."""
        function = getattr(owner, name)

        def timed(*args: Any, **keys: Any) -> Any:
            with self(phase):
                return function(*args, **keys)

        setattr(owner, name, timed)


def step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, size: int, precision: str
) -> None:
    """One optimizer step, as train() makes it."""
    workers = Workers.current()
    optimizer.zero_grad(set_to_none=True)

    def backward() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (loss * workers.size / size).backward()

    if isinstance(optimizer, KFAC):
        with optimizer.capture(size, worker_slice(size, workers.rank, workers.size)):
            backward()
    else:
        backward()
    optimizer.step()


def curvlinops_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Gradient, factors, inverses and the preconditioned gradient with curvlinops."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    parameters = [p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters()]
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    fisher = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(images, labels)], fisher_type="empirical",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    KFACInverseLinearOperator(fisher, damping=3e-2, use_heuristic_damping=True) @ [p.grad for p in parameters]


def measure(arguments: argparse.Namespace, size: int, watch: Stopwatch) -> dict[str, list[float]]:
    """Seconds of each kind of step, and of each phase, in every round."""
    workers, device = Workers.current(), torch.device(arguments.device)
    torch.manual_seed(0)
    model = models.build(arguments.model, (3, 32, 32), 10).to(device)
    part = worker_slice(size, workers.rank, workers.size)
    images = torch.randn(size, 3, 32, 32)[part].to(device)
    labels = torch.randint(10, (size,))[part].to(device)
    network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if workers.size > 1 else model
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    optimizer = KFAC(model, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    group, never = optimizer.param_groups[0], 10**9
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(kind: str, function: Callable[[], None]) -> None:
        watch.seconds.clear()
        with watch("rest"):
            function()
        seconds[kind].append(sum(watch.seconds.values()))
        for phase in PHASES:
            seconds[f"{kind} {phase}"].append(watch.seconds[phase])

    for _ in range(arguments.warmup + arguments.repeats):
        timed("sgd", lambda: step(network, sgd, images, labels, size, arguments.precision))
        for kind, intervals in (("inverse", (1, 1)), ("factors", (1, never)), ("precondition", (never, never))):
            group["factor_interval"], group["inverse_interval"] = intervals
            group["step"] = 0 if kind == "inverse" else max(1, group["step"])
            timed(kind, lambda: step(network, optimizer, images, labels, size, arguments.precision))
        if arguments.curvlinops and workers.size == 1:
            timed("curvlinops", lambda: curvlinops_step(model, images, labels))
    return {kind: values[arguments.warmup :] for kind, values in seconds.items()}


def report(arguments: argparse.Namespace, size: int, seconds: dict[str, list[float]]) -> None:
    """Print what one mini-batch size came to."""
    middle = {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()}
    precondition = middle["precondition precondition"]
    label = f"{arguments.model} at {size}"
    measuring.show(f"{label}: SGD", middle["sgd"], "ms a step")
    for every, whole_every in INTERVALS:  # steps between updates of the factors, and between inversions
        kinds = zip(*(seconds[kind] for kind in ("sgd", "precondition", "factors", "inverse")), strict=True)
        ratios = [
            (plain + max(0.0, updating - plain) / every + max(0.0, inverting - updating) / whole_every) / sgd
            for sgd, plain, updating, inverting in kinds
        ]
        shared = max(0.0, middle["inverse communication"] - middle["factors communication"])
        times = {
            "passes": middle["precondition"] - precondition,
            "factors": middle["factors factors"] / every,
            "inverses": middle["inverse inverse"] / whole_every,
            "preconditioning": precondition,
            "communication": middle["factors communication"] / every + shared / whole_every,
        }
        name = f"{label}: K-FAC ({every}, {whole_every})"
        for part, value in times.items():
            measuring.show(f"{name}, {part}", value, "ms a step")
        measuring.show(name, statistics.median(ratios), "times as long", "SGD")
    if "curvlinops" in seconds:
        theirs = measuring.ratio(seconds["curvlinops"], seconds["inverse"])
        measuring.show(f"{label}: curvlinops", theirs, "times as long", "K-FAC (1, 1)")


def benchmark(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """All tables, on one worker or as one of several."""
    torch.set_num_threads(arguments.threads)
    if arguments.workers > 1:
        backend = "nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=arguments.workers)
    watch = Stopwatch(torch.device(arguments.device))
    for owner, name, phase in TIMED:
        watch.wrap(owner, name, phase)
    if rank == 0:
        measuring.begin(arguments, f"{arguments.workers} workers, {arguments.precision}")
    for size in arguments.batch:
        seconds = measure(arguments, size, watch)
        if rank == 0:
            report(arguments, size, seconds)
    if arguments.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    """Read the command line and run."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--model", choices=["lenet5", "vgg9", "resnet18"], default="lenet5")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", type=int, default=1, help="data-parallel workers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--curvlinops", action="store_true", help="measure curvlinops too")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.batch, arguments.repeats, arguments.warmup, arguments.curvlinops = [8], 1, 0, True
    with tempfile.TemporaryDirectory() as folder:
        if arguments.workers == 1:
            benchmark(0, arguments, folder)
        else:
            mp.start_processes(benchmark, (arguments, folder), nprocs=arguments.workers, start_method="spawn")


if __name__ == "__main__":
    main()
