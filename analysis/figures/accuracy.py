"""The figure that a study is about: test accuracy against batch size, a line per optimizer, a panel per smoothing.

`accuracy_info` computes what is shown, `draw_accuracy` draws it: of every cell the mean of the confirmed runs of its
best configuration with an interval that stays between 0 and 1, and each run as a dot. Further factors have a row for
each combination. Where nothing has been confirmed, it is the validation accuracy of each cell's best trial.
"""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lbstudy.analysis import stats
from lbstudy.analysis.figures.style import (
    INK,
    Encoding,
    NothingToDraw,
    batch_size_axis,
    in_style,
    label_outer,
    mark_empty,
    panels,
    tip,
)
from lbstudy.analysis.tables.best import accuracy_by_repeat, best_trials, count_statuses, winners
from lbstudy.study.spec import StudySpec

WIDTH = 6.6
"""Of all panels together at least, in inches: the figure leads a page."""

MOST_NAMED = 3
"""Cells with diverged runs are named if they are so few."""


A_RUN: dict[str, Any] = {"marker": "o", "ls": "none", "ms": 3.4, "mew": 0.6, "mfc": "white"}
"""How a single run is drawn, in its optimizer's color."""


class Accuracy(NamedTuple):
    """Accuracies of the cells, and of the runs that they are means of."""

    study: StudySpec
    cells: pd.DataFrame
    """A row per cell: of (its further factors, in words), optimizer, batch_size, smoothing, value, low and high (NaN
    where there is no interval), n."""
    runs: pd.DataFrame  # a row per run: of, optimizer, batch_size, smoothing, accuracy
    confirmed: bool
    """Test accuracies of confirmed runs; else validation accuracies of the best trials."""
    lost: dict[str, tuple[int, int]]
    """Cell -> how many of its confirmed runs diverged, and are in no mean, of how many; only where some did."""


def accuracy_info(study: StudySpec, trials: pd.DataFrame, confirmed: pd.DataFrame) -> Accuracy:
    """Collect the accuracies of each cell's best configuration.

    Args:
        study: the study, with whatever further factors.
        trials: as from `load.trials`.
        confirmed: as from `load.confirmed`.

    Raises:
        NothingToDraw: no run was confirmed, and no trial has completed.
    """
    words = {cell: part.in_words for part in study.compared() for cell in part.list_cells()}
    found = {cell: accuracy_by_repeat(confirmed, cell.name) for cell in words}
    is_confirmed = any(map(len, found.values()))
    if not is_confirmed:
        best = best_trials(study, trials).set_index("cell")["val_accuracy"].astype(float)
        found = {cell: best[best.index == cell.name] for cell in found}
    cells, runs, lost = [], [], {}
    for cell, accuracies in found.items():
        key = (words[cell], cell.optimizer, cell.batch_size, cell.smoothing)
        if len(accuracies):
            mean = stats.mean_accuracy(accuracies)
            cells.append((*key, mean.value, mean.low, mean.high, mean.n))
            runs += [(*key, float(accuracy)) for accuracy in accuracies]
        counts = count_statuses(winners(confirmed), cell.name)
        if counts["diverged"]:
            lost[cell.name] = (counts["diverged"], counts["ended"])
    if not cells:
        raise NothingToDraw("no run was confirmed and no trial has completed")
    names = ["of", "optimizer", "batch_size", "smoothing"]
    return Accuracy(
        study, pd.DataFrame(cells, columns=[*names, "value", "low", "high", "n"]),
        pd.DataFrame(runs, columns=[*names, "accuracy"]), is_confirmed, lost,
    )  # fmt: skip


@in_style
def draw_accuracy(info: Accuracy, at_most: int | None = None) -> Figure:
    """A column of panels per smoothing, a row per combination of further factors, of which `at_most` are drawn."""
    encoding = Encoding.of(info.study)
    every = list(dict.fromkeys(info.cells["of"]))
    rows = every[:at_most]
    metric = "test accuracy" if info.confirmed else "validation accuracy"
    height = {1: 2.2, 2: 1.6}.get(len(rows), 1.1)
    figure, axes = panels(
        info.study.name, f"{metric} against batch size", _note(info, len(every) - len(rows)),
        [textwrap.fill(row, int(15 * height)) for row in rows],
        [encoding.study.label(smoothing) for smoothing in encoding.smoothings],
        width=max(1.7, WIDTH / len(encoding.smoothings)), height=height, sharey="row",
    )  # fmt: skip
    for row, of in enumerate(rows):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            cells, runs = (f[(f["of"] == of) & (f["smoothing"] == smoothing)] for f in (info.cells, info.runs))
            for place, optimizer in enumerate(encoding.optimizers):
                look = encoding.look(optimizer, smoothing=smoothing)
                beside = 1.07 ** (place - (len(encoding.optimizers) - 1) / 2)
                dots = runs[runs["optimizer"] == optimizer]
                panel.plot(dots["batch_size"] * beside, dots["accuracy"], mec=look["color"], zorder=4, **A_RUN)
                here = cells[cells["optimizer"] == optimizer].sort_values("batch_size")
                panel.plot(here["batch_size"] * beside, here["value"], **look | {"marker": None})
                panel.vlines(here["batch_size"] * beside, here["low"], here["high"], color=look["color"], lw=1)
                for cell in here.itertuples():
                    hollow: dict[str, Any] = {} if info.confirmed else {"fillstyle": "none"}
                    (mark,) = panel.plot(cell.batch_size * beside, cell.value, **look | hollow)
                    tip(mark, _tip(info.study, cell))
            if cells.empty:
                mark_empty(panel, "nothing confirmed" if info.confirmed else "no trial has completed")
            batch_size_axis(panel, encoding.batch_sizes)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=""))
    label_outer(axes, "batch size", f"{metric}, %")
    dot = Line2D([], [], mec=INK, label="a run", **A_RUN)
    interval = Line2D([], [], marker="|", ms=8, ls="none", color=INK, label="95 % interval")
    with_interval = [interval] * bool(info.cells["low"].notna().any())
    encoding.legend(figure, ["optimizer"], [*with_interval, dot])
    return figure


def _tip(study: StudySpec, cell: Any) -> str:
    """A cell's numbers in words."""
    interval = "" if np.isnan(cell.low) else f" [{100 * cell.low:.2f}, {100 * cell.high:.2f}]"
    who = [study.label(cell.optimizer), f"batch {cell.batch_size}", study.label(cell.smoothing), cell.of]
    return f"{', '.join(filter(None, who))}: {100 * cell.value:.2f} %{interval}, n = {cell.n}"


def _note(info: Accuracy, left_out: int) -> str:
    """What is shown, and what is missing."""
    if not info.confirmed:
        sentences = ["Nothing was confirmed: each cell's best trial, n = 1, which was chosen for being the best."]
    else:
        low, high = info.cells["n"].min(), info.cells["n"].max()
        seeds = f"{low}" if low == high else f"{low} to {high}"
        bars = ", bars: 95 % intervals of the mean" if info.cells["low"].notna().any() else ""
        mean = f"mean of n = {seeds} seed{'' if high == 1 else 's'} after the last epoch"
        sentences = [f"Best configuration of each cell, {mean}{bars}."]
    if info.lost:
        runs = f"{sum(count for count, _ in info.lost.values())} of {sum(of for _, of in info.lost.values())} runs"
        cells = f"{len(info.lost)} cells" if len(info.lost) > MOST_NAMED else ", ".join(info.lost)
        sentences.append(f"Diverged, and in no mean: {runs} of {cells}.")
    if left_out:
        sentences.append(f"{left_out} more combinations are in the file that `lbstudy figures` writes.")
    return " ".join(sentences)
