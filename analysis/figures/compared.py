"""Several studies in one figure: test accuracy against batch size, a panel per smoothing, a line style per study.

`compared_info` computes what is shown, `draw_compared` draws it. Of every cell that is the mean over the confirmed runs
of its best configuration, with its interval. A study with further factors has a line style for each of their
combinations. Colours are those of the optimizers, in the order of the first study that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lbstudy.analysis import stats
from lbstudy.analysis.figures.style import (
    COLOURS,
    INK,
    LINES,
    NothingToDraw,
    batch_size_axis,
    in_style,
    label_outer,
    mark_empty,
    panels,
)
from lbstudy.analysis.tables.best import accuracy_by_repeat
from lbstudy.study.spec import StudySpec


class ComparedAccuracy(NamedTuple):
    """Test accuracies of the cells of several studies."""

    cells: pd.DataFrame
    """A row per cell: study (with the values of its further factors), optimizer, batch_size, smoothing, value, low and
    high (NaN where there is no interval), n."""
    labels: dict[str, str]  # of optimizers and smoothings, in the order in which they are shown
    without: list[str]  # studies of which nothing has been confirmed


def compared_info(studies: Sequence[tuple[str, StudySpec, pd.DataFrame]]) -> ComparedAccuracy:
    """Collect the accuracies of each cell's best configuration.

    Args:
        studies: a name, the study, and `load.confirmed` of its folder.

    Raises:
        NothingToDraw: no run of any of them was confirmed.
    """
    cells, labels, without = list[tuple[object, ...]](), dict[str, str](), list[str]()
    for name, study, confirmed in studies:
        before = len(cells)
        for part in study.compared():
            line = f"{name}, {part.in_words}" if part.in_words else name
            for cell in part.list_cells():
                mean = stats.mean_accuracy(accuracy_by_repeat(confirmed, cell.name))
                labels |= {m: study.label(m) for m in (cell.optimizer, cell.smoothing) if m not in labels}
                if mean.n:
                    row = (line, cell.optimizer, cell.batch_size, cell.smoothing)
                    cells.append((*row, mean.value, mean.low, mean.high, mean.n))
        if len(cells) == before:
            without.append(name)
    if not cells:
        raise NothingToDraw("no run of these studies was confirmed")
    names = ["study", "optimizer", "batch_size", "smoothing", "value", "low", "high", "n"]
    return ComparedAccuracy(pd.DataFrame(cells, columns=names), labels, without)


@in_style
def draw_compared(info: ComparedAccuracy) -> Figure:
    """A panel per smoothing: a line per study and optimizer, with intervals."""
    cells = info.cells
    studies = list(dict.fromkeys(cells["study"]))
    optimizers, smoothings = ([m for m in info.labels if m in set(cells[of])] for of in ("optimizer", "smoothing"))
    colours = {optimizer: COLOURS[place % len(COLOURS)] for place, optimizer in enumerate(optimizers)}
    styles = {study: LINES[place % len(LINES)] for place, study in enumerate(studies)}
    low, high = cells["n"].min(), cells["n"].max()
    note = f"Best configuration of each cell, mean of n = {low if low == high else f'{low} to {high}'} seeds"
    note += ", bars: 95 % intervals of the mean." if cells["low"].notna().any() else "."
    if info.without:
        note += f" Nothing confirmed: {', '.join(info.without)}."
    figure, axes = panels(
        f"{len(studies)} studies", "test accuracy against batch size", note, [""],
        [info.labels[smoothing] for smoothing in smoothings], width=2.2, height=2.3,
    )  # fmt: skip
    lines = [(study, optimizer) for study in studies for optimizer in optimizers]
    for panel, smoothing in zip(axes[0], smoothings, strict=True):
        here = cells[cells["smoothing"] == smoothing]
        for place, (study, optimizer) in enumerate(lines):
            line = here[(here["study"] == study) & (here["optimizer"] == optimizer)].sort_values("batch_size")
            sizes = line["batch_size"] * 1.04 ** (place - (len(lines) - 1) / 2)  # beside each other
            panel.plot(sizes, line["value"], color=colours[optimizer], linestyle=styles[study], marker="o", ms=3)
            panel.vlines(sizes, line["low"], line["high"], color=colours[optimizer], lw=0.8)
        if here.empty:
            mark_empty(panel, "nothing confirmed")
        batch_size_axis(panel, sorted(set(cells["batch_size"])))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=""))
    label_outer(axes, "batch size", "test accuracy, %")
    entries: list[Artist] = [Line2D([], [], lw=3, color=colours[o], label=info.labels[o]) for o in optimizers]
    entries += [Line2D([], [], color=INK, linestyle=styles[study], label=study) for study in studies]
    figure.legend(handles=entries, loc="outside lower center", ncols=max(2, int(figure.get_figwidth() / 1.5)))
    return figure
