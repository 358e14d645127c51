"""What a training step costs with each optimizer and smoothing, beside one with SGD and no smoothing.

`train()` of one epoch of a fixed number of steps at a time, without validation, one worker and no Ray, synthetic
3x32x32 images with crop and flip. The methods take turns within a round; printed are medians of the ratios of CPU time
within each round (on a GPU, of wall time). K-FAC's two numbers are the intervals, in steps, of its statistics and its
inverses; its round begins with both.

    uv run python benchmarks/step.py    # LeNet-5 at batch 128; 10 minutes of a free core
    uv run python benchmarks/step.py --model vgg9 --batch 128 --steps 2
"""

from __future__ import annotations

from functools import partial
from statistics import median

from benchmarks import _measuring as measuring
from benchmarks.throughput import NETWORKS, Case, run_spec, time_train
from lbstudy.methods import configure
from lbstudy.study.run import RunSpec
from lbstudy.training import data, datasets

NUMBERS = {
    "learning_rate": 0.01, "weight_decay": 1e-4, "mixup_alpha": 1.0, "cutmix_alpha": 1.0, "noise_magnitude": 0.01,
    "label_smoothing": 0.1, "ema_decay": 0.99, "sam_radius": 0.05,
}  # fmt: skip
REFERENCE = "sgd"
METHODS: dict[str, tuple[str, str, dict[str, float]]] = {
    REFERENCE: ("sgd", "none", {}),
    "gradient clip": ("sgd", "none", {"gradient_clip": 1.0}),
    "label smoothing": ("sgd", "label_smoothing", {}),
    "ema": ("sgd", "ema", {}),
    "mixup": ("sgd", "mixup", {}),
    "cutmix": ("sgd", "cutmix", {}),
    "noise": ("sgd", "noise", {}),
    "sam": ("sgd", "sam", {}),
    "adamw": ("adamw", "none", {}),
    "lars": ("lars", "none", {}),
    "lamb": ("lamb", "none", {}),
    "muon": ("muon", "none", {}),
    "kfac (10, 100)": ("kfac", "none", {"factor_interval": 10, "inverse_interval": 100}),
    "kfac (1, 1)": ("kfac", "none", {}),
}


def method_run(case: Case, name: str) -> RunSpec:
    """A run with this method."""
    optimizer, smoothing, numbers = METHODS[name]
    known = configure.numbers_of(optimizer, smoothing)
    hyper = {key: value for key, value in NUMBERS.items() if key in known} | numbers
    return run_spec(case).model_copy(update={"optimizer": optimizer, "smoothing": smoothing, "hyper": hyper})


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--model", choices=list(NETWORKS), default="lenet5")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of a round; K-FAC (10, 100) wants 100")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=list(METHODS), help="these alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    if options.smoke:
        options.batch, options.steps, options.rounds = 16, 2, 1
    measuring.begin(options)
    case = Case(options.model, options.batch, options.steps, options.rounds)
    runs = {name: method_run(case, name) for name in METHODS if name in (REFERENCE, *options.method)}
    some = runs[REFERENCE]
    images = data.place(datasets.load(some.dataset), some.dataset, some.split_seed, options.device)
    seconds = measuring.take_turns({name: partial(time_train, run, images) for name, run in runs.items()}, case.rounds)
    clock = "cpu" if options.device == "cpu" else "wall"
    times = {name: [getattr(s, clock) for s in taken] for name, taken in seconds.items()}
    label = f"{options.model} at {options.batch}"
    measuring.show(f"{label}: {REFERENCE}", 1e3 * median(times[REFERENCE]) / case.steps, f"ms a step ({clock} time)")
    for name, taken in times.items():
        if name != REFERENCE:
            measuring.show(f"{label}: {name}", measuring.ratio(taken, times[REFERENCE]), "times as long", REFERENCE)


if __name__ == "__main__":
    main()
