"""The gap table: small against large batch per optimizer and smoothing, and how much of the gap each smoothing closes.

Accuracies are test accuracies of the confirmed runs of each cell's best configuration, after the last epoch. Runs of
one repeat share their seed in all cells, so everything is computed from differences within repeats. Two questions are
easily confused, and answered apart (SB, LB: mean accuracy at the small and the large batch):

* `closed`: how much of what plain large-batch training loses does this smoothing win back?
  1 - (SB(none) - LB(smoothing)) / (SB(none) - LB(none)).
* `narrowed`: how much nearer are the two batch sizes to each other when both are smoothed?
  1 - (SB(smoothing) - LB(smoothing)) / (SB(none) - LB(none)). A smoothing that spoils the small batch narrows too.

A share is given only where the gap is significant. Of weak gaps those are given that came out too large by chance,
which draws their shares towards one half: `is_weak`.
"""

from __future__ import annotations

from math import isnan
from typing import Any

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.tables.best import accuracy_by_repeat, count_statuses, failed_runs, winners, with_factors
from lbstudy.study.factors import Factors
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.study.split import part_of

COLUMNS: dict[str, Any] = {
    "optimizer": object, "smoothing": object, "small_batch": "Int64", "large_batch": "Int64", "n": "Int64",
    "small_accuracy": float, "large_accuracy": float, "gap": float, "gap_low": float, "gap_high": float,
    "gap_at_best_epoch": float, "gap_at_best_epoch_low": float, "gap_at_best_epoch_high": float,
    "resolvable": float, "gap_to_none": float, "gap_to_none_low": float, "gap_to_none_high": float,
    "closed": float, "closed_low": float, "closed_high": float, "closed_n": "Int64",
    "narrowed": float, "narrowed_low": float, "narrowed_high": float, "narrowed_n": "Int64", "note": object,
}  # fmt: skip


def gap_table(study: StudySpec, confirmed: pd.DataFrame) -> pd.DataFrame:
    """A row per cell above its optimizer's smallest batch size; all accuracies are fractions. Cells are compared with
    those that share all of their further factors.

    Columns: `gap`, small minus large batch under the row's own smoothing, with its 95 % interval over the `n` repeats
    that both cells completed (the two accuracies are means over the same repeats); `gap_at_best_epoch`, the same
    configurations, chosen by their last epochs, with each run read at its best validation epoch, if that is known of
    all of them: a small batch makes more updates in the same epochs, and over-fits sooner; `resolvable`, the smallest
    true gap that so many repeats are likely to show; `gap_to_none`, the small batch *without* smoothing minus the row's
    large batch; `closed` and `narrowed` (module docstring), as fractions with Fieller intervals, each over the repeats
    common to its cells, `closed_n` and `narrowed_n`. A share is only given where the interval of the gap without
    smoothing lies above zero; `note` says what is missing and why, and beside which shares a weak gap stands.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    accuracies = {cell.name: accuracy_by_repeat(confirmed, cell.name) for cell in study.list_cells()}
    rows = [_row(small, large, accuracies, confirmed) for small, large in list_pairs(study)]
    return pd.DataFrame(rows, columns=with_factors(COLUMNS, study)).astype(COLUMNS)


WEAK = 2
"""A gap is weak unless it is so many times as large as its margin, the half of its interval."""


def is_weak(gap: stats.Mean) -> bool:
    """Whether shares of a significant gap are likely to be drawn towards one half because it was selected for its size.

    By simulation (tests/analysis/tables/test_gaps.py), the median of the given shares of a gap of 1.5 standard errors
    is +0.2 where the truth is 0, and 0.8 where it is 1; from 4 standard errors on it is within 0.05. The gap's true
    size is not known; of gaps of 1.5 standard errors some 2 to 4 % are large enough by chance not to count as weak.
    """
    return gap.value < WEAK * (gap.high - gap.value)


def list_pairs(study: StudySpec) -> list[tuple[Cell, Cell]]:
    """Each cell above its optimizer's smallest batch size, after the one it is compared with, in the study's order.
    The smallest is that of cells with equal further factors. Cells that split a gap have none of their own."""
    smallest: dict[tuple[str, Factors], int] = {}
    for cell in (cells := [cell for cell in study.list_cells() if part_of(cell.factors) is None]):
        key = (cell.optimizer, cell.factors)
        smallest[key] = min(cell.batch_size, smallest.get(key, cell.batch_size))
    pairs = [(cell.but(batch_size=smallest[cell.optimizer, cell.factors]), cell) for cell in cells]
    return [(small, large) for small, large in pairs if small.batch_size < large.batch_size]


def _row(small: Cell, large: Cell, accuracies: dict[str, pd.Series], confirmed: pd.DataFrame) -> dict[str, object]:
    plain_small, plain_large = (cell.but(smoothing="none") for cell in (small, large))
    nothing = pd.Series(dtype=float)
    sb, lb, plain_sb, plain_lb = (
        accuracies.get(cell.name, nothing) for cell in (small, large, plain_small, plain_large)
    )
    stopped = stats.paired_difference(
        *(accuracy_by_repeat(confirmed, cell.name, "test_at_best_epoch") for cell in (small, large))
    )
    common = sb.index.intersection(lb.index)
    gap, to_none = stats.paired_difference(sb, lb), stats.paired_difference(plain_sb, lb)
    row: dict[str, object] = {
        **large.values, "small_batch": small.batch_size, "large_batch": large.batch_size,
        "n": gap.n, "resolvable": stats.smallest_resolvable(gap.sd, gap.n),
        # over the common repeats, so that the columns add up; alone, each cell's mean is still worth showing
        "small_accuracy": (sb.loc[common] if len(common) else sb).mean(),
        "large_accuracy": (lb.loc[common] if len(common) else lb).mean(),
        **_with_interval("gap", gap),
        **(_with_interval("gap_at_best_epoch", stopped) if stopped.n == gap.n else {}),
    }  # fmt: skip
    notes = [absence(cell, accuracies, confirmed) for cell in (small, large)]
    if large.smoothing == "none":
        notes.append(_why_not_told(gap))
    else:
        row |= _with_interval("gap_to_none", to_none)
        shares = {
            "closed": stats.share_closed(plain_sb - plain_lb, plain_sb - lb),
            "narrowed": stats.share_closed(plain_sb - plain_lb, sb - lb),
        }
        notes.append(_why_no_share(plain_small, plain_large, accuracies))
        if not notes[-1]:
            bounded = {name: share for name, share in shares.items() if share.shape == "bounded"}
            for name, share in bounded.items():
                row |= _with_interval(name, share) | {f"{name}_n": share.n}
            notes += [_why_not_given(name, share) for name, share in shares.items() if name not in bounded]
            if bounded and is_weak(stats.paired_difference(plain_sb, plain_lb)):
                notes.append(WEAK_NOTE)
    row["note"] = "; ".join(note for note in notes if note)
    return row


WEAK_NOTE = (
    f"weak gap: less than {WEAK} times its margin, so that it was given for coming out large, which draws shares "
    "towards one half"
)


def _with_interval(name: str, estimate: stats.Mean | stats.Ratio) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def absence(cell: Cell, accuracies: dict[str, pd.Series], confirmed: pd.DataFrame) -> str:
    """What is missing of a cell's confirmed runs."""
    if cell.name not in accuracies:
        return f"{cell.name} is no cell of the study"
    counts, completed = count_statuses(winners(confirmed), cell.name), len(accuracies[cell.name])
    diverged = f"{counts['diverged']} of {counts['ended'] + counts['running']} confirmed runs of {cell.name} diverged"
    if not completed:
        return diverged if counts["diverged"] else f"{cell.name} has no completed confirmed run"
    missing = [f"{diverged} and are not in the means"] if counts["diverged"] else []
    missing += ["one seed has no interval"] if completed == 1 else []
    if failed := failed_runs(accuracies[cell.name]):
        low, high = accuracies[cell.name].min(), accuracies[cell.name].max()
        missing.append(
            f"{failed} of {completed} confirmed runs of {cell.name} hardly learnt ({low:.3g} to {high:.3g}): "
            "its mean says little"
        )
    return "; ".join(missing)


def _why_no_share(small: Cell, large: Cell, accuracies: dict[str, pd.Series]) -> str:
    """Why no share of the gap between these two cells, without smoothing, can be claimed; empty if it can."""
    if missing := [cell.name for cell in (small, large) if not len(accuracies.get(cell.name, []))]:
        return f"no share of a gap without {' and '.join(missing)}"
    gap = stats.paired_difference(accuracies[small.name], accuracies[large.name])
    if gap.n < 2:
        return "no share: one seed cannot tell the gap without smoothing from zero"
    if isnan(gap.low):
        return "no share: the gap without smoothing is the same at every repeat, so that its spread is not known"
    if not stats.excludes_zero(gap):
        return "no share: the gap without smoothing cannot be told from zero"
    return "no share: without smoothing the large batch does better" if gap.value < 0 else ""


def _why_not_told(gap: stats.Mean) -> str:
    """Why a gap of two or more repeats cannot be told from zero; empty if it can."""
    if gap.n < 2 or stats.excludes_zero(gap):
        return ""
    return "the gap is the same at every repeat: no interval" if isnan(gap.low) else "the gap cannot be told from zero"


def _why_not_given(name: str, share: stats.Ratio) -> str:
    """Why a share is missing although there is a gap."""
    if not share.n:
        return f"`{name}` is not given: its cells have no repeats in common"
    if share.shape == "none" and share.n > 1:
        return f"`{name}` is not given: it is {share.value:.2g} at every repeat, so that its spread is not known"
    return f"`{name}` is not given: the {share.n} repeats common to its cells cannot tell the gap from zero"
