"""What a study says about the claims of its sources, in sentences made from the numbers of its tables.

A claim is made of comparisons between cells, at the largest batch size of each optimizer. A comparison decides where a
95 % interval lies wholly on one side of a threshold; an interval that holds the threshold, one seed, or a cell of which
confirmed runs diverged or hardly learnt cannot tell. The claim is supported, or contradicted, where all its comparisons
say so, which makes it no easier to be wrong with more of them. How often each verdict comes where it should not is
simulated by benchmarks/claims.py.

Cells are compared that share all other factors: each function is about one variant of a study, and `together` about
all. Tables are of the variant too (`load.of_variant`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp, inf, isnan, nan
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report import power
from lbstudy.analysis.report.sentences import (
    count,
    gap_sentence,
    in_points,
    ratio_words,
    share_sentence,
    smoothed,
    worded,
)
from lbstudy.analysis.tables import published
from lbstudy.analysis.tables.best import READINGS, accuracy_by_repeat, count_statuses, failed_runs, winners
from lbstudy.analysis.tables.minima import MEASURES
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

Verdict = Literal["supported", "contradicted", "cannot tell"]

HALF = 0.5
"""The share of the loss of accuracy that smoothing is claimed to exceed."""

LEVEL = 1 - stats.LEVEL
"""Largest p value that decides."""


class Comparison(NamedTuple):
    """What one pair of cells says about a claim, or another thing that a study found."""

    verdict: Verdict | None  # None: no claim is at stake
    sentence: str
    need: str = ""  # what it would take to tell, in a sentence
    of: tuple[str, ...] = ()  # the combinations of further factors that it is about, in words; none: all


class Claim(NamedTuple):
    """A claim of the sources, and what this study says about it."""

    name: str
    claim: str
    rule: str
    comparisons: list[Comparison]
    elsewhere: str  # what others found, and how to read the words
    table: str  # the table that holds the numbers

    @property
    def verdict(self) -> Verdict:
        """What all comparisons say; where they differ, or one cannot tell, neither can they together."""
        return agreed(self.comparisons) or "cannot tell"


def agreed(comparisons: Iterable[Comparison]) -> Verdict | None:
    """The verdict of all comparisons that have one, open where they differ; None where no claim is at stake."""
    found = {comparison.verdict for comparison in comparisons if comparison.verdict}
    if len(found) > 1:
        return "cannot tell"
    return found.pop() if found else None


DECISIVE = ("eigenvalue_1", "width_1")
"""The measures (of `tables.minima.MEASURES`) that decide about minima: one of curvature, one of width."""


def decide(low: float, high: float, threshold: float, above: Verdict) -> Verdict:
    """The verdict of an interval: `above` where it lies above the threshold, the opposite below it."""
    below: Verdict = "contradicted" if above == "supported" else "supported"
    if low > threshold:
        return above
    return below if high < threshold else "cannot tell"  # so it is where they are NaN, for lack of seeds


UNTUNED = " This decides nothing, since the configurations were tuned to reach a target soon, not for accuracy."


def judged(verdict: Verdict, sentence: str, need: str) -> Comparison:
    """A comparison that says what it would take where it cannot tell."""
    return Comparison(verdict, sentence, need if verdict == "cannot tell" else "")


def _about_accuracy(study: StudySpec, verdict: Verdict, sentence: str, need: str) -> Comparison:
    """The same of accuracies, which configurations that were tuned for another thing do not decide about."""
    if study.tuning.goal:
        return Comparison("cannot tell", sentence + UNTUNED, "Configurations that are tuned for accuracy would tell.")
    return judged(verdict, sentence, need)


def together(claims: Sequence[tuple[StudySpec, Claim]]) -> Claim:
    """What all variants of a study say about a claim, each of which says it about itself; all must agree. What several
    say in the same words stands once."""
    said: dict[tuple[Comparison, ...], list[str]] = {}
    for part, claim in claims:
        said.setdefault(tuple(claim.comparisons), []).append(part.in_words)
    if len(said) == 1:
        return claims[0][1]
    found = [c._replace(of=tuple(words)) for comparisons, words in said.items() for c in comparisons]
    return claims[0][1]._replace(comparisons=found)


def led(variant: StudySpec, sentence: str) -> str:
    """A sentence about a variant, led by the values of the further factors that its cells share."""
    words = variant.in_words
    return f"With {words}: {sentence}" if words else sentence


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


STAGES = {
    "": "", "half": ", where SGD was halfway,", "end": ", where SGD ended,", "tuned": ", which both were tuned for,",
}  # fmt: skip


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


WHEN_STOPPED = (
    "More seeds would not change that: which batch size does better depends on when training is stopped. These "
    "configurations were chosen by their last epochs; tuning that is stopped early would tell more."
)


def _turns(row: dict[str, Any]) -> bool:
    """Whether a gap is a loss after the last epoch and a gain at the best ones, or the other way round."""
    last, best = (stats.side(row[f"{name}_low"], row[f"{name}_high"]) for name in ("gap", "gap_at_best_epoch"))
    return last * best < 0


def generalises_worse(study: StudySpec, confirmed: pd.DataFrame, gaps: pd.DataFrame) -> Claim:
    """A large batch generalises worse. `gaps`: `gaps.gap_table`. Gaps with a smoothing are told beside the claim."""
    comparisons, beside = [], []
    for row in at_largest_batch(gaps):
        cells = _cells(study, row, [row["smoothing"]])
        warning = lost(confirmed, cells)
        sentence = gap_sentence(worded(row, study)) + warning
        if row["smoothing"] == "none":
            verdict: Verdict = "cannot tell"
            if warning:
                need = power.FAILING
            elif _turns(row):
                need = WHEN_STOPPED
            else:
                verdict = decide(row["gap_low"], row["gap_high"], 0, above="supported")
                need = power.sentence([power.of_row(row, "gap")], 0)
            comparisons.append(_about_accuracy(study, verdict, sentence, need))
            beside += outdone(confirmed, cells)
        elif not isnan(row["gap"]):
            beside += [Comparison(None, sentence), *outdone(confirmed, cells)]
    return Claim(
        "generalisation",
        "A large batch generalises worse.",
        "Test accuracy without smoothing at the smallest batch size minus that at the largest, each configuration "
        "tuned; paired by seed, its 95 % interval against 0. After the last epoch; where each run’s best validation "
        "epoch says the opposite, neither decides.",
        [*(comparisons or [_no_gap(study)]), *beside],
        "Keskar et al. (ICLR 2017) and Naganuma and Yokota (2019) say so. Shallue et al. (JMLR 2019), who tuned anew "
        "at every batch size, found no evidence that it must; they trace disagreement to tuning and to budgets.",
        "gap",
    )


def more_than_halves(study: StudySpec, confirmed: pd.DataFrame, gaps: pd.DataFrame) -> Claim:
    """Smoothing cuts the loss of accuracy to less than half. `gaps`: `gaps.gap_table`."""
    comparisons, rows = [], list(at_largest_batch(gaps))
    turned = {row["optimizer"] for row in rows if row["smoothing"] == "none" and _turns(row)}
    for row in rows:
        if row["smoothing"] != "none":
            warning = lost(confirmed, _cells(study, row, ["none", row["smoothing"]]))
            verdicts = {
                decide(row[f"{notion}_low"], row[f"{notion}_high"], HALF, above="supported")
                for notion in ("closed", "narrowed")
            }
            verdict = verdicts.pop() if len(verdicts) == 1 and not warning else "cannot tell"
            need = power.FAILING if warning else _need_of_shares(study, confirmed, row)
            if verdict != "cannot tell" and row["optimizer"] in turned:  # there is a loss to cut at one reading only
                verdict, need = "cannot tell", WHEN_STOPPED
            comparisons.append(_about_accuracy(study, verdict, share_sentence(worded(row, study)) + warning, need))
    if not comparisons and gaps["smoothing"].eq("none").any():
        comparisons = [Comparison("cannot tell", "The study has no smoothing at a large batch.")]
    return Claim(
        "smoothing",
        "Smoothing cuts the loss of accuracy at a large batch to less than half.",
        "The share of the gap between batch sizes that smoothing takes away, against 50 %. The source leaves open "
        "which share is meant, so the 95 % intervals of both must lie on one side: closed, the smoothed large batch "
        "against the plain small batch; narrowed, both batch sizes smoothed.",
        comparisons or [_no_gap(study)],
        "This is the one quantitative claim in the text of Naganuma and Yokota’s slides (2019); they give neither "
        "seeds nor intervals. Wen et al. (SmoothOut, 2018) report gains at small and large batches alike.",
        "gap",
    )


def _need_of_shares(study: StudySpec, confirmed: pd.DataFrame, row: dict[str, Any]) -> str:
    """What it would take for both shares to lie on one side of one half.

    A share r = 1 - left / gap is above one half where gap / 2 - left has a mean above zero, which is the t test that
    Fieller's interval is made of.
    """
    plain_small, plain_large, small, large = (
        accuracy_by_repeat(confirmed, cell) for cell in _cells(study, row, ["none", row["smoothing"]])
    )
    gap = stats.paired_difference(plain_small, plain_large)
    if not stats.excludes_zero(gap):
        need = power.sentence([gap], 0) if gap.value > 0 else ""
        return f"First the gap without smoothing must be told from zero. {need}" if need else ""
    if gap.value < 0:
        return "More seeds would not decide it: without smoothing the large batch does not lose."
    half = HALF * (plain_small - plain_large)
    beyond = [stats.mean(half - left) for left in (plain_small - large, small - large)]
    if min(b.value for b in beyond) < 0 < max(b.value for b in beyond):
        return power.OPPOSED.format("the two shares")
    return power.sentence(beyond, 0)


def wider_minima(study: StudySpec, runs: pd.DataFrame) -> Claim:
    """Smoothed minima are wider. `runs`: `minima_table.runs`."""
    # where most valleys go on beyond the line there is a lower bound of the width, which decides nothing
    runs = runs.assign(width_1=runs["width_1"].mask(runs["beyond"] >= 0.5, inf))
    present = [name for name in DECISIVE if runs[name].notna().any()]
    comparisons = []
    for optimizer in dict.fromkeys(cell.optimizer for cell in study.list_cells()):
        batch = max(cell.batch_size for cell in study.list_cells() if cell.optimizer == optimizer)
        here = runs[(runs["optimizer"] == optimizer) & (runs["batch_size"] == batch)]
        smoothings = [c.smoothing for c in study.list_cells() if (c.optimizer, c.batch_size) == (optimizer, batch)]
        if "none" in smoothings and present:
            comparisons += [_minima(study, optimizer, batch, s, here, present) for s in smoothings if s != "none"]
    if not comparisons:
        why = "There is no smoothed cell beside a plain one" if present else "No minimum has been measured"
        comparisons = [Comparison("cannot tell", f"{why}.")]
    return Claim(
        "minima",
        "Smoothed minima are wider (flatter).",
        "The smoothed minimum over the plain one at the largest batch size, paired by seed; 95 % interval of the ratio "
        "against 1. Every measure that was taken must agree: "
        + "; ".join(f"{MEASURES[name].label}, large means {MEASURES[name].large_is}" for name in DECISIVE)
        + ".",
        comparisons,
        "Large positive eigenvalues mean a sharp minimum (Keskar et al. 2017). Naganuma and Yokota’s slides (2019) "
        "have the two words swapped and call such a minimum flat; here the words are Keskar’s. Eigenvalues change when "
        "weights are rescaled though the function stays the same; widths along filter-normalised directions do not. On "
        "the line between two solutions the sharper side flips with weight decay (Li et al. 2018): it decides nothing.",
        "sharpness",
    )


def _minima(
    study: StudySpec, optimizer: str, batch: int, smoothing: str, runs: pd.DataFrame, present: list[str]
) -> Comparison:
    plain, smoothed = (runs[runs["smoothing"] == s].set_index("repeat") for s in ("none", smoothing))
    if failed := failed_runs(plain["test_accuracy"]) + failed_runs(smoothed["test_accuracy"]):
        who = f"{study.label(optimizer)} at batch {batch} with {study.label(smoothing)} or without"
        sentence = f"{who}: {failed} of the runs hardly learnt, and such lie flat anyway."
        return Comparison("cannot tell", sentence, power.FAILING)
    parts, verdicts, ratios = [], set(), []
    for name in present:
        measure, ratio = MEASURES[name], _ratio(smoothed[name].astype(float), plain[name].astype(float))
        above: Verdict = "supported" if measure.large_is == "flat" else "contradicted"
        verdicts.add(decide(ratio.low, ratio.high, 1, above=above))
        ratios.append((power.in_logarithms(ratio), above))
        known = "not measured in both" if not ratio.n else "not finite and positive in every run"
        if name == "width_1" and ratio.n and inf in {*plain[name], *smoothed[name]}:
            known = "not known, since some valley goes on beyond the line"
        words = f"{ratio_words(ratio)} that without smoothing ({count(ratio.n)})" if not isnan(ratio.value) else known
        parts.append(f"{measure.label} {words}")
    sentence = f"{study.label(optimizer)} at batch {batch} with {study.label(smoothing)}: {'; '.join(parts)}."
    sides = {(ratio.value > 0) == (above == "supported") for ratio, above in ratios}
    need = (
        power.sentence([ratio for ratio, _ in ratios], 0) if len(sides) == 1 else power.OPPOSED.format("the measures")
    )
    need = "" if any(isnan(ratio.value) for ratio, _ in ratios) else need
    return judged(verdicts.pop() if len(verdicts) == 1 else "cannot tell", sentence, need)


def _no_gap(study: StudySpec) -> Comparison:
    """Why there is no gap table to judge by."""
    if len({cell.batch_size for cell in study.list_cells()}) == 1:
        return Comparison("cannot tell", "The study has one batch size.")
    return Comparison("cannot tell", "The study has no cell without smoothing to compare with.")


def at_largest_batch(gaps: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the gap table at each optimizer's largest batch size."""
    largest = gaps.groupby("optimizer", sort=False)["large_batch"].transform("max")
    rows = gaps[gaps["large_batch"] == largest]
    return [{str(name): value for name, value in row.items()} for _, row in rows.iterrows()]


def _cells(study: StudySpec, row: dict[str, Any], smoothings: Iterable[str]) -> list[str]:
    cell = study.list_cells()[0].but(optimizer=row["optimizer"])
    sizes = (row["small_batch"], row["large_batch"])
    return [cell.but(batch_size=size, smoothing=smoothing).name for smoothing in smoothings for size in sizes]


def lost(confirmed: pd.DataFrame, cells: Iterable[str]) -> str:
    """A warning where runs of these cells diverged or hardly learnt: a mean of such and others is neither's."""
    found, runs = [], winners(confirmed)
    for cell in cells:
        diverged, failed = count_statuses(runs, cell)["diverged"], failed_runs(accuracy_by_repeat(runs, cell))
        found += [f"{diverged} of {cell} diverged"] * bool(diverged) + [f"{failed} of {cell} hardly learnt"] * bool(
            failed
        )
    return f" This decides nothing, since confirmed runs failed: {', '.join(found)}." if found else ""


def outdone(confirmed: pd.DataFrame, cells: Iterable[str]) -> list[Comparison]:
    """A sentence for each of these cells whose published configuration did better than the one that was chosen."""
    found = []
    for cell in cells:
        if leads := published.outdone(confirmed, cell):
            last, stopped = leads
            at_best = f"; where validation was best, {in_points(stopped)} more" if stopped.n == last.n else ""
            found.append(
                Comparison(
                    None,
                    f"Tuning has not found {cell}’s best: a published configuration, which it did not choose, reached "
                    f"{in_points(last, ' points')} more test accuracy after the last epoch ({count(last.n)}){at_best}.",
                )
            )
    return found


def _ratio(first: pd.Series, second: pd.Series) -> stats.Mean:
    """The geometric mean of the ratio of two measures with its interval, paired by repeat.

    NaN where any of them has no logarithm: leaving out those that are not positive or not finite would be a choice.
    """
    first, second = first.dropna().align(second.dropna(), join="inner")
    if not all((values > 0).all() and np.isfinite(values).all() for values in (first, second)):
        return stats.Mean(nan, nan, len(first), nan, nan)
    mean = stats.paired_difference(np.log(first), np.log(second))
    return mean._replace(value=exp(mean.value), low=exp(mean.low), high=exp(mean.high))


def _fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    from scipy.stats import fisher_exact  # here, since the import takes most of a second

    return float(fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)
