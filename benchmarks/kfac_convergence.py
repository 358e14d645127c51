"""Epochs and seconds to a training loss: K-FAC against SGD on a large mini-batch, both tuned with the same budget.

LeNet-5, no smoothing. Each optimizer's configurations come from the same quasi-random points: learning rate for both,
damping for K-FAC, whose steps are clipped. They train for a few epochs, and the one with the lowest training loss
then trains with three fresh seeds until it reaches the target or the epochs end. Test accuracy is taken once, at the
end. The optimizers take turns, so that whatever else the machine does hits both.

    uv run python benchmarks/kfac_convergence.py --data ROOT    # CIFAR-10; about 20 minutes on two cores
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.stats import qmc

from benchmarks import _measuring as measuring
from lbstudy.study.run import DatasetSpec, RunSpec
from lbstudy.training import datasets
from lbstudy.training.data import ImageData, place
from lbstudy.training.train import EpochReport, evaluate, train

RANGES = {"learning_rate": (1e-3, 0.5), "damping": (1e-3, 1.0)}


def make_run(dataset: DatasetSpec, optimizer: str, params: dict[str, float], options: argparse.Namespace) -> RunSpec:
    """A run of the benchmark."""
    clip = {"kl_clip": options.kl_clip or None} if optimizer == "kfac" else {}
    hyper = {"momentum": 0.9, "weight_decay": 1e-4, **clip, **params}
    return RunSpec.model_validate(
        {
            "model": "lenet5", "dataset": dataset, "batch_size": options.batch, "optimizer": optimizer,
            "hyper": hyper, "budget": {"epochs": options.epochs}, "seed": 0,
        }
    )  # fmt: skip


def tune(dataset: DatasetSpec, data: ImageData, optimizer: str, options: argparse.Namespace) -> dict[str, float]:
    """The configuration with the lowest training loss after a few epochs."""
    points = qmc.Sobol(2, rng=0).random(options.trials)
    names = ["learning_rate"] if optimizer == "sgd" else ["learning_rate", "damping"]
    found: list[tuple[float, dict[str, float]]] = []
    for point in points:
        params = {
            name: float(np.exp(np.interp(u, [0, 1], np.log(RANGES[name]))))
            for name, u in zip(names, point, strict=False)
        }
        run = make_run(dataset, optimizer, params, options)
        last = train(run, data, on_epoch=lambda report, _: report.epoch == options.tuning_epochs).last
        loss = float("inf") if last.diverged else last.train_loss
        found.append((loss, params))
        shown = " ".join(f"{name} {value:.2g}" for name, value in params.items())
        print(f"  {optimizer:5} {shown}: train loss {loss:.3f}", flush=True)
    return min(found, key=lambda pair: pair[0])[1]


def main() -> None:
    """Tune, measure, print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data", help="CIFAR-10: torchvision's files or an image tree; default: the user's cache")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tuning-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--target", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kl-clip", type=float, default=0.01, help="of K-FAC; 0: none")
    options = parser.parse_args()
    dataset = DatasetSpec(name="cifar10", root=options.data, validation_size=5000)
    if options.smoke:
        options.batch, options.trials, options.tuning_epochs, options.epochs, options.seeds = 32, 2, 1, 1, 1
        dataset = DatasetSpec(name="digits", validation_size=0.9)
    measuring.begin(options)
    data = place(datasets.load(dataset), dataset, 0)
    found: dict[str, list[tuple[int, float]]] = {"sgd": [], "kfac": []}  # epochs and seconds of each seed
    best = {optimizer: tune(dataset, data, optimizer, options) for optimizer in found}
    for seed in range(1, options.seeds + 1):
        for optimizer, params in best.items():
            reports: list[EpochReport] = []

            def until_target(report: EpochReport, _: object, reports: list[EpochReport] = reports) -> bool:
                reports.append(report)
                return report.train_loss <= options.target

            run = make_run(dataset, optimizer, params, options).model_copy(update={"seed": seed})
            outcome = train(run, data, on_epoch=until_target)
            reached = outcome.last.train_loss <= options.target
            test_accuracy = evaluate(outcome.model, data, data.test)[1]
            found[optimizer].append((len(reports), sum(r.seconds for r in reports)))
            name = f"{optimizer}, seed {seed}: epochs to a training loss of {options.target:g}"
            measuring.show(name, f"{'' if reached else 'more than '}{len(reports)}", "epochs", _against(found, 0))
            measuring.show(f"{optimizer}, seed {seed}: time", found[optimizer][-1][1], "s", _against(found, 1))
            measuring.show(f"{optimizer}, seed {seed}: test accuracy", f"{test_accuracy:.4f}", "fraction")
    print("chosen:", best)


def _against(found: dict[str, list[tuple[int, float]]], place: int) -> str:
    """What SGD took with the same seed, once K-FAC has been here."""
    sgd, kfac = found["sgd"], found["kfac"]
    return f"sgd: {sgd[-1][place]:.3g}" if len(sgd) == len(kfac) else ""


if __name__ == "__main__":
    main()
