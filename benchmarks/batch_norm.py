"""How much of a generalisation gap was an artefact of batch norm's running statistics.

VGG9 is trained at several batch sizes, with and without parameter noise. After every epoch the same weights are
validated twice: with the usual running statistics, a moving average that takes in a tenth per step, under the noise
if there is any; and with the statistics that `train()` computes afresh before an evaluation. Training itself uses
neither, so the two differ in nothing else.

    uv run python benchmarks/batch_norm.py --data ROOT    # an image tree of CIFAR-10; some 20 minutes of a free core
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import lbstudy.training.train as training
from benchmarks import _measuring as measuring
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.parallel.randomness import stream
from lbstudy.study.run import DatasetSpec, RunSpec
from lbstudy.training import datasets
from lbstudy.training.data import EpochImages, ImageData, place, stratified_choice
from lbstudy.training.dataset import Dataset
from lbstudy.training.loop import Loop

MOMENTUM = 0.1


class MovingStatistics:
    """The running statistics as they are usually kept: running <- 0.9 running + 0.1 (this step's), from 0 and 1."""

    def __init__(self) -> None:
        self._seen: dict[BatchNorm, list[torch.Tensor]] = {}
        self._kept: dict[BatchNorm, torch.Tensor] = {}

    def after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take in what a training pass saw."""
        if isinstance(module, BatchNorm) and module.training and torch.is_grad_enabled():
            for mean, inverse_std, values in module._latest:
                variance = (inverse_std.pow(-2) - module.eps) * values / (values - 1)
                self._seen.setdefault(module, []).append(torch.stack([mean, variance]) * values)
                self._seen[module][-1] = torch.cat([self._seen[module][-1], torch.full_like(mean, float(values))[None]])

    @torch.no_grad()
    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """One optimizer step is over, however many passes it took."""
        for module, seen in self._seen.items():
            total = torch.stack(seen).sum(0)
            new = total[:2] / total[2]
            old = self._kept.setdefault(module, torch.stack([torch.zeros_like(new[0]), torch.ones_like(new[0])]))
            old.lerp_(new, MOMENTUM)
        self._seen.clear()

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Make them the model's running statistics."""
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.copy_(self._kept[module][0])  # type: ignore[union-attr]
                module.running_var.copy_(self._kept[module][1])  # type: ignore[union-attr]


@contextmanager
def validated_twice(data: ImageData, run: RunSpec) -> Iterator[list[tuple[float, float]]]:
    """Within the block a run's weights are validated with moving statistics too; yields loss and accuracy of these."""
    moving, found = MovingStatistics(), list[tuple[float, float]]()
    renew = training.renew_statistics

    def renew_after_a_look(loop: Loop, images: EpochImages, starts: range, step: int, within: bool = False) -> None:
        moving.put(loop.model)
        found.append(training.evaluate(loop.model, data, data.validation, run.precision))
        renew(loop, images, starts, step, within)

    hooks = [
        register_module_forward_hook(moving.after_forward),
        register_optimizer_step_post_hook(moving.after_step),
    ]
    training.renew_statistics = renew_after_a_look
    try:
        yield found
    finally:
        training.renew_statistics = renew
        for hook in hooks:
            hook.remove()


def measure(data: ImageData, run: RunSpec) -> pd.DataFrame:
    """A row per epoch: validation accuracy and loss with moving and with renewed statistics."""
    rows = []
    with validated_twice(data, run) as moving:

        def on_epoch(report: training.EpochReport, snapshot: Any) -> bool:
            loss, accuracy = moving[-1]
            rows.append(
                {"epoch": report.epoch, "moving": accuracy, "renewed": report.val_accuracy, "moving_loss": loss,
                 "renewed_loss": report.val_loss, "seconds": report.seconds}
            )  # fmt: skip
            print(f"{run.batch_size} {run.smoothing} {rows[-1]}", flush=True)
            return False

        training.train(run, data, on_epoch=on_epoch)
    return pd.DataFrame(rows)


def subset(full: Dataset, samples: int) -> Dataset:
    """The first training samples of a random, stratified choice; the test set is not used."""
    chosen = stratified_choice(full.train_labels, samples, stream(0, "subset"))
    return Dataset(
        full.train_images[chosen], full.train_labels[chosen], full.test_images[:100], full.test_labels[:100],
        full.classes,
    )  # fmt: skip


def main() -> None:
    """Train, validate twice, print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data", help="an image tree; default: the digits")
    parser.add_argument("--image-size", type=int, default=8, help="pixels; VGG9 takes a sixteenth of the time at 8")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--samples", type=int, default=17_384, help="of the training set; 1,000 of them validate")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.03)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="one for each batch size")
    parser.add_argument("--ghost", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.epochs, options.batches, options.rates = 60, 1, [16, 32], [0.05, 0.1]
        options.ghost, options.data = 16, None
    measuring.begin(options)
    validation = min(1000, options.samples // 4)
    keys = {"name": "image_folder", "root": options.data, "image_size": options.image_size}
    dataset = DatasetSpec.model_validate(
        (keys if options.data else {"name": "digits"}) | {"validation_size": validation}
    )
    data = place(subset(datasets.load(dataset), options.samples), dataset, 0)
    parts = []
    for smoothing, number in (("none", {}), ("noise", {"noise_magnitude": options.noise})):
        for batch, rate in zip(options.batches, options.rates, strict=True):
            run = RunSpec.model_validate(
                {
                    "model": "vgg9", "dataset": dataset, "batch_size": batch, "optimizer": "sgd",
                    "smoothing": smoothing, "budget": {"epochs": options.epochs},
                    "hyper": {"learning_rate": rate, "weight_decay": 5e-4, "nesterov": True, **number},
                    "schedule": {"name": "cosine", "warmup": 1}, "batch_norm": {"ghost": options.ghost},
                    "micro_batch_size": 2 * options.ghost, "precision": options.precision,
                }
            )  # fmt: skip
            parts.append(measure(data, run).assign(smoothing=smoothing, batch=batch))
    table = pd.concat(parts).set_index(["smoothing", "epoch", "batch"])
    small, large = options.batches[0], options.batches[-1]
    for (smoothing, epoch, batch), row in table.iterrows():
        name = f"{smoothing}, epoch {epoch}: accuracy at {batch}, renewed statistics"
        measuring.show(name, f"{row['renewed']:.4f}", "fraction", f"moving statistics: {row['moving']:.4f}")
    for smoothing, epoch in table.index.droplevel("batch").unique():
        gaps = table.loc[(smoothing, epoch, small)] - table.loc[(smoothing, epoch, large)]
        name = f"{smoothing}, epoch {epoch}: gap from {small} to {large}, renewed statistics"
        measuring.show(name, f"{100 * gaps['renewed']:.2f}", "points", f"moving statistics: {100 * gaps['moving']:.2f}")


if __name__ == "__main__":
    main()
