"""How often the report's verdicts are right: made-up studies, judged by the functions that the report uses.

Each case draws the confirmed runs of many studies with 3, 5 and 10 seeds and counts the verdicts of a claim. A verdict
that the truth does not allow should come in 5 % of the studies at most. Test accuracies are counted in images of a test
set of `IMAGES`; a failed run has hardly learnt (accuracy 0.1, a flat minimum): one in ten, where a case says so.

    uv run python benchmarks/claims.py            # half an hour on one core; --studies 50 for a first look
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks import _measuring as measuring
from lbstudy.analysis.report import claims
from lbstudy.analysis.tables import gaps, targets
from lbstudy.methods.checks import load_study
from lbstudy.study.load import find_study
from lbstudy.study.spec import Cell, StudySpec

IMAGES, EPOCHS, FAILURES = 360, 30, 0.1
SEEDS = (3, 5, 10)
SMALL, LARGE = 32, 512

Draw = Callable[[np.random.Generator, int], claims.Claim]
"""A claim judged on one made-up study with so many seeds."""


class Case(NamedTuple):
    """Studies with one truth."""

    claim: str
    truth: str  # in words
    allowed: tuple[claims.Verdict, ...]  # verdicts that are no errors
    draw: Draw


def study_of(*optimizers: str) -> StudySpec:
    """The digits study with two batch sizes, with and without Mixup."""
    sizes, smoothings = [SMALL, LARGE], ["none", "mixup"]
    cells = {"cells.optimizer": list(optimizers), "cells.batch_size": sizes, "cells.smoothing": smoothings}
    return load_study(find_study("digits.yaml"), cells)


SGD, BOTH = study_of("sgd"), study_of("sgd", "kfac")


def runs_frame(study: StudySpec, values: dict[Cell, np.ndarray], name: str) -> pd.DataFrame:
    """As `load.confirmed` has them: completed runs of each cell's best configuration, with one metric."""
    cells = [cell for cell in values for _ in values[cell]]
    repeats = [repeat for cell in values for repeat in range(len(values[cell]))]
    columns = {
        "cell": [cell.name for cell in cells], "optimizer": [cell.optimizer for cell in cells],
        "batch_size": [cell.batch_size for cell in cells], "smoothing": [cell.smoothing for cell in cells],
        "number": repeats, "repeat": repeats, "trial": 0, "rank": pd.array([0] * len(cells), "Int64"),
        "published": False, "status": "completed", "train_on": "split", name: np.concatenate(list(values.values())),
    }  # fmt: skip
    text = ["cell", "optimizer", "smoothing", "status", "train_on"]
    return pd.DataFrame(columns).astype(dict.fromkeys(text, object))  # which compare twice as fast as strings


def accuracies(
    random: np.random.Generator, seeds: int, means: dict[Cell, float], sd: float, failures: float = 0
) -> pd.DataFrame:
    """Confirmed runs with test accuracies around these means, to whole images; some runs fail."""
    values = {}
    for cell, mean in means.items():
        images = np.round(IMAGES * np.clip(random.normal(mean, sd, seeds), 0, 1))
        values[cell] = np.where(random.random(seeds) < failures, 0.1, images / IMAGES)
    runs = runs_frame(SGD, values, "test_accuracy")
    return runs.assign(test_at_best_epoch=runs["test_accuracy"])  # no run over-fits


def gap_case(
    gap: float, base: float = 0.9, sd: float = 0.01, failures: float = 0, smoothed: float | None = None
) -> Draw:
    """Studies in which the large batch loses `gap`, and smoothed `smoothed` of it (both batch sizes alike)."""
    means = {Cell("sgd", SMALL, "none"): base, Cell("sgd", LARGE, "none"): base - gap}
    if smoothed is not None:
        means |= {Cell("sgd", SMALL, "mixup"): base, Cell("sgd", LARGE, "mixup"): base - smoothed * gap}
    judge = claims.generalises_worse if smoothed is None else claims.more_than_halves

    def draw(random: np.random.Generator, seeds: int) -> claims.Claim:
        confirmed = accuracies(random, seeds, means, sd, failures)
        return judge(SGD, confirmed, gaps.gap_table(SGD, confirmed))

    return draw


def minima_case(ratio: float, failures: float = 0) -> Draw:
    """Studies in which Mixup multiplies the top eigenvalue by `ratio` and divides the width by it."""
    plain, smoothed = Cell("sgd", LARGE, "none"), Cell("sgd", LARGE, "mixup")

    def draw(random: np.random.Generator, seeds: int) -> claims.Claim:
        noise = np.exp(random.normal(0, 0.2, (2, 2, seeds)))
        failed = random.random((2, seeds)) < failures
        sharp = np.where(failed, 0.01, noise[0] * np.array([[20], [20 * ratio]]))
        frame = runs_frame(SGD, dict(zip((plain, smoothed), np.where(failed, 0.1, 0.9), strict=True)), "test_accuracy")
        width = np.where(failed, 2.0, noise[1] * np.array([[0.5], [0.5 / ratio]]))
        return claims.wider_minima(SGD, frame.assign(eigenvalue_1=sharp.ravel(), width_1=width.ravel(), beyond=0.0))

    return draw


def times_to_sgd(
    confirmed: pd.DataFrame, sgd: np.ndarray, losses: dict[Cell, np.ndarray]
) -> dict[targets.Target, pd.DataFrame]:
    """As `targets.winners_times` has them, for the targets of training loss that `targets` takes from SGD's runs.

    Args:
        confirmed: the runs.
        sgd: training loss of SGD's runs, seeds x epochs.
        losses: that of every cell's.
    """
    times = {}
    for stage, at in (("end", EPOCHS), ("half", EPOCHS // 2)):
        goal = targets.Target("clean_train_loss", float(sgd[:, at - 1].max()), stage)
        met = np.concatenate([loss <= goal.value for loss in losses.values()])
        first = np.where(met.any(axis=1), met.argmax(axis=1) + 1.0, np.inf)
        times[goal] = confirmed[["cell", "repeat"]].assign(epochs=first, epochs_low=first - 1)
    return times


def steps_case(speed: float, end: float = 1, failures: float = 0) -> Draw:
    """Studies in which K-FAC gets anywhere in `speed` times SGD's epochs, and ends at `end` times its loss besides.

    The loss of a run falls as exp(-3 t / T) over its T = 30 epochs, each run a little faster or slower (10 %), with
    noise of 3 % from epoch to epoch; `end` comes in over the last third, as under a decaying learning rate.
    """
    sgd, kfac = Cell("sgd", LARGE, "none"), Cell("kfac", LARGE, "none")
    epoch = np.arange(1, EPOCHS + 1)

    def draw(random: np.random.Generator, seeds: int) -> claims.Claim:
        losses = {}
        for cell, rate, final in ((sgd, 1.0, 1.0), (kfac, 1 / speed, end)):
            pace = rate * np.exp(random.normal(0, 0.1, (seeds, 1)))
            late = final ** np.clip(3 * epoch / EPOCHS - 2, 0, 1)
            loss = np.exp(-3 * pace * epoch / EPOCHS + random.normal(0, 0.03, (seeds, EPOCHS))) * late
            loss[random.random(seeds) < failures] = 2.3
            losses[cell] = loss
        confirmed = runs_frame(BOTH, {cell: loss[:, -1] for cell, loss in losses.items()}, "clean_train_loss")
        confirmed[["test_accuracy", "test_at_best_epoch"]] = 0.9
        return claims.fewer_steps(BOTH, confirmed, times_to_sgd(confirmed, losses[sgd], losses))

    return draw


YES: tuple[claims.Verdict, ...] = ("supported", "cannot tell")
NO: tuple[claims.Verdict, ...] = ("contradicted", "cannot tell")
OPEN: tuple[claims.Verdict, ...] = ("cannot tell",)

CASES = [
    Case("steps", "half of SGD’s steps", YES, steps_case(0.5)),
    Case("steps", "twice SGD’s steps", NO, steps_case(2)),
    Case("steps", "as many steps", OPEN, steps_case(1)),
    Case("steps", "as many steps to halfway, then ends at 0.7 of SGD’s loss", OPEN, steps_case(1, end=0.7)),
    Case("steps", "half of SGD’s steps, one run in ten fails", YES, steps_case(0.5, failures=FAILURES)),
    Case("steps", "as many steps, one run in ten fails", OPEN, steps_case(1, failures=FAILURES)),
    Case("generalisation", "loses 3 points", YES, gap_case(0.03)),
    Case("generalisation", "gains 3 points", NO, gap_case(-0.03)),
    Case("generalisation", "no gap", OPEN, gap_case(0)),
    Case("generalisation", "no gap at 0.98, deviation 0.5 image", OPEN, gap_case(0, 0.98, 0.5 / IMAGES)),
    Case("generalisation", "no gap, one run in ten fails", OPEN, gap_case(0, failures=FAILURES)),
    Case("smoothing", "a gap of 6 points, Mixup leaves 0.1", YES, gap_case(0.06, smoothed=0.1)),
    Case("smoothing", "a gap of 6 points, Mixup leaves 0.9", NO, gap_case(0.06, smoothed=0.9)),
    Case("smoothing", "a gap of 6 points, Mixup leaves half", OPEN, gap_case(0.06, smoothed=0.5)),
    Case("smoothing", "a gap of 1 point (weak), Mixup leaves all", NO, gap_case(0.01, smoothed=1)),
    Case("smoothing", "no gap", OPEN, gap_case(0, smoothed=1)),
    Case("smoothing", "Mixup leaves half, one run in ten fails", OPEN, gap_case(0.06, smoothed=0.5, failures=FAILURES)),
    Case("minima", "half as sharp", YES, minima_case(0.5)),
    Case("minima", "twice as sharp", NO, minima_case(2)),
    Case("minima", "as sharp", OPEN, minima_case(1)),
    Case("minima", "as sharp, one run in ten fails", OPEN, minima_case(1, FAILURES)),
]  # fmt: skip


def verdicts(case: Case, seeds: int, studies: int) -> dict[claims.Verdict, float]:
    """The share of each verdict among so many studies."""
    random = np.random.default_rng([seeds, studies])
    counts = Counter(case.draw(random, seeds).verdict for _ in range(studies))
    return {verdict: counts[verdict] / studies for verdict in ("supported", "contradicted", "cannot tell")}


def main() -> None:
    """Simulate and print the verdicts of each case, in percent, for each number of seeds."""
    parser = measuring.parser(__doc__, threads=None)
    parser.add_argument("--studies", type=int, default=500, help="studies per case and number of seeds")
    parser.add_argument("--claim", choices=sorted({case.claim for case in CASES}), help="this claim only")
    options = parser.parse_args()
    if options.smoke:
        options.studies = 2
    measuring.begin(options, f"{options.studies} studies each")
    print("supported / contradicted, % of the studies; * an error that comes in more than 5 %")
    for case in CASES:
        if options.claim not in (None, case.claim):
            continue
        for seeds in SEEDS[:1] if options.smoke else SEEDS:
            share = verdicts(case, seeds, options.studies)
            wrong = any(share[v] > 0.05 for v in share if v not in case.allowed)
            shown = f"{100 * share['supported']:.1f} / {100 * share['contradicted']:.1f}{'*' if wrong else ''}"
            measuring.show(f"{case.claim}: {case.truth}, {seeds} seeds", shown, "%", " or ".join(case.allowed))


if __name__ == "__main__":
    main()
