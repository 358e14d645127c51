"""Whether K-FAC needs fewer steps than SGD at a large batch."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan

import numpy as np
import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report import power
from lbstudy.analysis.report.claims.verdicts import Claim, Comparison, decide, judged, outdone
from lbstudy.analysis.report.sentences import count, in_points, ratio_words, smoothed
from lbstudy.analysis.tables.best import READINGS, accuracy_by_repeat, winners
from lbstudy.analysis.tables.targets import (
    Target,
    baseline,
    choose_targets,
    halfway_targets,
    resolution,
    speed_ratio,
    tuned_target,
)
from lbstudy.study.spec import Cell, StudySpec

LEVEL = 1 - stats.LEVEL
"""Largest p value that decides."""

STAGES = {
    "": "", "half": ", where SGD was halfway,", "end": ", where SGD ended,", "tuned": ", which both were tuned for,",
}  # fmt: skip


def rivals(study: StudySpec) -> tuple[Cell, Cell] | None:
    """K-FAC's and SGD's cell at the largest batch size that both have with the same smoothing, preferably none."""
    cells = study.list_cells()
    pairs = [(cell, cell.but(optimizer="sgd")) for cell in cells if cell.optimizer == "kfac"]
    found = [pair for pair in pairs if pair[1] in cells]
    return max(found, key=lambda pair: (pair[0].batch_size, pair[0].smoothing == "none"), default=None)


def goals(study: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame) -> list[Target]:
    """The targets that decide whether K-FAC needs fewer steps, as far as they are known: what the study was tuned to
    reach in few steps; else where SGD's cell of the `rivals` is halfway, and where it ends.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        epochs: `load.confirmed_epochs` of its folder.
    """
    pair, tuned = rivals(study), tuned_target(study)
    if not pair:
        return []
    if tuned and tuned_for_steps(study):
        return [tuned]
    found = [*halfway_targets(confirmed, epochs, pair[1]), *choose_targets(study, confirmed, cell=pair[1])]
    return [target for target in found if not isnan(target.value)]


def tuned_for_steps(study: StudySpec) -> bool:
    """Whether configurations were tuned to reach a target in few steps, or epochs: the same within a cell."""
    return study.tuning.goal is not None and study.tuning.metric in ("steps_to_target", "epochs_to_target")


def fewer_steps(study: StudySpec, confirmed: pd.DataFrame, times: dict[Target, pd.DataFrame]) -> Claim:
    """K-FAC needs fewer steps than SGD at a large batch.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        times: `targets.winners_times` for each of the `goals`.
    """
    pair, optimizers = rivals(study), {cell.optimizer for cell in study.list_cells()}
    soon = tuned_for_steps(study)
    more = (
        " Nor are steps to a target within one budget the fewest that a method can do with: neither was tuned to get "
        "there soon."
    )
    more = "" if soon else more
    missing = " and ".join(study.label(name) for name in ("kfac", "sgd") if name not in optimizers)
    if pair:
        on_all = winners(confirmed)["train_on"].eq("all").any()  # then validation samples are trained on
        usable = [target for target in times if not (on_all and target.metric.startswith("val_"))]
        comparisons = [_steps(study, *pair, target, times[target]) for target in usable]
        comparisons += _beside_steps(study, *pair, {target: times[target] for target in usable}, confirmed)
        why = f"No confirmed run of {pair[1].name} has completed, so there is no target."
        if soon and times:
            why = "Confirmed runs trained on the validation samples, so the target says nothing of them."
    else:
        comparisons = []
        why = f"The study has no {missing}." if missing else "K-FAC and SGD share no batch size with one smoothing."
    return Claim(
        "steps",
        "K-FAC needs fewer steps than SGD at a large batch.",
        _rule(study),
        comparisons or [Comparison("cannot tell", why)],
        "Naganuma and Yokota (2019) say so. Ma et al. (AAAI 2020) found, over 512 and more runs per batch size and "
        "method, that K-FAC scales with batch size no better than SGD, and is as sensitive to its hyper-parameters. "
        f"Fewer steps are not less time: a K-FAC step costs more, and the table has the seconds too.{more}",
        "targets-sgd" if comparisons and pair and pair[1] != baseline(study) and not soon else "targets",
    )


def _beside_steps(
    study: StudySpec, kfac: Cell, sgd: Cell, times: dict[Target, pd.DataFrame], confirmed: pd.DataFrame
) -> Iterator[Comparison]:
    """What a reader must know beside the claim: the same with each other smoothing, to where training ends, and what
    K-FAC's fewer steps are worth in accuracy."""
    stages = STAGES | {"end": f", where SGD ended {smoothed(study.label(sgd.smoothing))},"}
    for smoothing in dict.fromkeys(cell.smoothing for cell in study.list_cells()):
        one, other = (cell.but(smoothing=smoothing) for cell in (kfac, sgd))
        for target, found in times.items():
            if smoothing != kfac.smoothing and target.stage != "half" and {one.name, other.name} <= {*found["cell"]}:
                yield Comparison(None, _steps(study, one, other, target, found, stages).sentence)
    if tuned_for_steps(study):
        return
    yield from outdone(confirmed, (kfac.name, sgd.name))
    lead, stopped = (
        stats.paired_difference(*(accuracy_by_repeat(confirmed, cell.name, metric) for cell in (kfac, sgd)))
        for metric in READINGS
    )
    if not isnan(lead.low):
        same = stopped.n == lead.n and not isnan(stopped.low)
        at_best = f"; read where validation was best, it is {in_points(stopped)}" if same else ""
        yield Comparison(
            None,
            "Both were tuned for accuracy at the end, neither to get there soon, and at the end K-FAC’s test accuracy "
            f"less SGD’s is {in_points(lead, ' points')} ({count(lead.n)}){at_best}.",
        )


def _rule(study: StudySpec) -> str:
    """How the claim is decided, which depends on what the study was tuned for."""
    ratio = (
        "Where every run has got there: the ratio K-FAC to SGD, paired by seed, against 1; times are known to "
        f"{resolution(study)}, and the 95 % interval is widened by the most that can hide in that."
    )
    fisher = (
        "Else a run that has not is infinitely late: Fisher’s exact test of how many have, at 5 %, which takes four "
        "seeds of each."
    )
    if tuned_for_steps(study):
        return (
            f"Steps until a run reaches the target that every configuration was tuned to reach soon "
            f"({study.tuning.goal}), at the largest batch size of both, without smoothing. {ratio} {fisher}"
        )
    return (
        "Steps until a run is where the worst SGD run was halfway through its epochs, and where it ended, at the "
        "largest batch size of both, without smoothing, each configuration tuned; all must agree. Where the learning "
        "rate has decayed, the steps to the end say mostly which of the two ends lower: they do not decide alone. "
        f"{ratio} {fisher}"
    )


def _steps(
    study: StudySpec, kfac: Cell, sgd: Cell, target: Target, times: pd.DataFrame, stages: dict[str, str] = STAGES
) -> Comparison:
    where = f"At batch {kfac.batch_size}" + (f" with {study.label(kfac.smoothing)}" if kfac.smoothing != "none" else "")
    both = [times[times["cell"] == cell.name].set_index("repeat") for cell in (kfac, sgd)]
    own, other = (runs["epochs"].astype(float) for runs in both)
    if own.empty or other.empty:
        return Comparison("cannot tell", f"No confirmed run of {(kfac if own.empty else sgd).name} has ended.")
    goal = f"{target}{stages[target.stage]}"
    reached = [int(np.isfinite(runs).sum()) for runs in (own, other)]
    if reached == [len(own), len(other)]:
        # of epochs, which at one batch size have the same number of steps
        ratio = speed_ratio(own, other, *(runs["epochs_low"] for runs in both))
        sentence = f"{where}, K-FAC reached {goal} in {ratio_words(ratio)} SGD’s steps ({count(ratio.n)})."
        return judged(
            decide(ratio.low, ratio.high, 1, above="contradicted"), sentence,
            power.sentence([power.in_logarithms(ratio)], 0),
        )  # fmt: skip
    p, least = _fisher(reached[0], len(own), reached[1], len(other)), _fisher(len(own), len(own), 0, len(other))
    few = f"; so few runs cannot bring it below {least:.2g}, and four of each could" if least > LEVEL else ""
    sentence = (
        f"{where}, {reached[0]} of {len(own)} K-FAC runs and {reached[1]} of {len(other)} SGD runs reached "
        f"{goal.rstrip(',')} (Fisher’s exact test: p = {p:.2g}{few})."
    )
    if p > LEVEL:
        need = power.sentence_of_counts(reached[0], len(own), reached[1], len(other), LEVEL) if len(other) else ""
        return Comparison("cannot tell", sentence, need)
    return Comparison("supported" if reached[0] / len(own) > reached[1] / len(other) else "contradicted", sentence)


def _fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    from scipy.stats import fisher_exact  # here, since the import takes most of a second

    return float(fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)
