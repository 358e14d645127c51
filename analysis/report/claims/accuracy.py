"""What a large batch costs in accuracy, and how much of it smoothing wins back."""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan
from typing import Any

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report import power
from lbstudy.analysis.report.claims.verdicts import Claim, Comparison, Verdict, decide, judged, lost, outdone
from lbstudy.analysis.report.sentences import gap_sentence, share_sentence, worded
from lbstudy.analysis.tables.best import accuracy_by_repeat
from lbstudy.study.spec import StudySpec

HALF = 0.5
"""The share of the loss of accuracy that smoothing is claimed to exceed."""

UNTUNED = " This decides nothing, since the configurations were tuned to reach a target soon, not for accuracy."

WHEN_STOPPED = (
    "More seeds would not change that: which batch size does better depends on when training is stopped. These "
    "configurations were chosen by their last epochs; tuning that is stopped early would tell more."
)


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


def _about_accuracy(study: StudySpec, verdict: Verdict, sentence: str, need: str) -> Comparison:
    """The same of accuracies, which configurations that were tuned for another thing do not decide about."""
    if study.tuning.goal:
        return Comparison("cannot tell", sentence + UNTUNED, "Configurations that are tuned for accuracy would tell.")
    return judged(verdict, sentence, need)


def _turns(row: dict[str, Any]) -> bool:
    """Whether a gap is a loss after the last epoch and a gain at the best ones, or the other way round."""
    last, best = (stats.side(row[f"{name}_low"], row[f"{name}_high"]) for name in ("gap", "gap_at_best_epoch"))
    return last * best < 0


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
