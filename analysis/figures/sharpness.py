"""Figures of sharpness: the Hessian's spectrum in every cell, and sharpness against test accuracy.

Each is two functions: `*_info` computes what is shown, `draw_*` draws it. Large positive eigenvalues mean a sharp
minimum; see `minima_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from lbstudy.analysis.figures.style import (
    INK,
    Encoding,
    NothingToDraw,
    in_style,
    label_outer,
    log_axis,
    mark_empty,
    panels,
)
from lbstudy.analysis.minima.hessian import SpectralDensity
from lbstudy.analysis.stats import Correlation, rank_correlation
from lbstudy.analysis.tables.minima import CHIEF, MEASURES
from lbstudy.study.spec import StudySpec

DECADES = 7
"""How far below its highest value a density is shown; farther down it is the tails of the broadening."""

APART = 10
"""From this ratio of the cells' largest eigenvalues on, their axis is linear near 0 only and logarithmic beyond."""

COMMAND = "`lbstudy sharpness STUDY`"


class Densities(NamedTuple):
    """The spectral density of each cell's Hessian."""

    study: StudySpec
    eigenvalues: NDArray[np.float64]  # common to all cells
    densities: dict[str, NDArray[np.float64]]  # by cell; mean over its runs
    seeds: dict[str, int]  # runs of a cell
    linear: float  # the axis is linear up to here; infinite: everywhere


def densities_info(
    study: StudySpec, runs: pd.DataFrame, found: Mapping[tuple[str, int], SpectralDensity], points: int = 300
) -> Densities:
    """The mean density over the seeds of each cell's best configuration.

    Args:
        study: the study.
        runs: as from `minima_table.runs`.
        found: as from `results.spectral_densities`.
        points: eigenvalues of each run, several to the width of its broadening; all runs' together are the grid.

    Raises:
        NothingToDraw: no run has a density.
    """
    by_cell: dict[str, list[SpectralDensity]] = {}
    for cell, number in zip(runs["cell"], runs["number"], strict=True):
        if (cell, number) in found:
            by_cell.setdefault(cell, []).append(found[cell, number])
    if not by_cell:
        raise NothingToDraw(f"no sharpness was measured of a confirmed run; run {COMMAND}")
    grids = {cell: np.concatenate([d.grid(points) for d in densities]) for cell, densities in by_cell.items()}
    eigenvalues = np.unique(np.concatenate(list(grids.values())))
    means = {cell: np.mean([d.at(eigenvalues) for d in densities], axis=0) for cell, densities in by_cell.items()}
    largest = [np.abs(grid).max() for grid in grids.values()]
    linear = 10 ** np.floor(np.log10(min(largest))) if max(largest) > APART * min(largest) else np.inf
    return Densities(study, eigenvalues, means, {cell: len(densities) for cell, densities in by_cell.items()}, linear)


@in_style
def draw_densities(info: Densities) -> Figure:
    """A row per optimizer, a column per smoothing, a line per batch size."""
    encoding = Encoding.of(info.study)
    counts = info.seeds.values()
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    figure, axes = panels(
        info.study.name, "density of the Hessian's eigenvalues at the final weights",
        f"Training loss; stochastic Lanczos quadrature, mean over n = {seeds} seed{'' if max(counts) == 1 else 's'}. "
        "Large positive eigenvalues: a sharp minimum."
        + (f" Logarithmic beyond ±{info.linear:g}." if np.isfinite(info.linear) else ""),
        encoding.optimizers, encoding.smoothings,
    )  # fmt: skip
    top = max(density.max() for density in info.densities.values())
    for row, optimizer in enumerate(encoding.optimizers):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            for cell in sorted(info.study.list_cells(), key=lambda cell: cell.batch_size):
                if (cell.optimizer, cell.smoothing) == (optimizer, smoothing) and cell.name in info.densities:
                    look = encoding.look(optimizer, cell.batch_size) | {"lw": 1}
                    panel.plot(info.eigenvalues, info.densities[cell.name], **look)
            if not panel.lines:
                mark_empty(panel, "not measured")
            panel.set_yscale("log")
            panel.set_ylim(top / 10**DECADES, 3 * top)
            panel.yaxis.set_major_locator(LogLocator(numticks=5))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            if np.isfinite(info.linear):
                panel.set_xscale("symlog", linthresh=info.linear)
                panel.xaxis.set_major_locator(FixedLocator(_decades(info)))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            else:
                panel.xaxis.set_major_locator(MaxNLocator(4))
    label_outer(axes, "eigenvalue", "density")
    encoding.legend(figure, ["optimizer", "batch size"])
    return figure


def _decades(info: Densities) -> list[float]:
    """0 and powers of ten, on either side, from the first beyond which the axis is logarithmic; every so many of them
    that their labels find room."""
    low, high, first = info.eigenvalues[0], info.eigenvalues[-1], round(np.log10(info.linear)) + 1

    def powers(stride: int) -> list[float]:
        every = [sign * 10.0**exponent for exponent in range(first, 40, stride) for sign in (-1, 1)]
        return [power for power in every if low <= power <= high]

    return [0.0, *powers(1 + len(powers(1)) // 5)]


class SharpnessAccuracy(NamedTuple):
    """Sharpness and test accuracy of the cells."""

    study: StudySpec
    cells: pd.DataFrame  # as from `minima_table.minima_table`
    correlations: dict[str, Correlation]  # by measure; across cells, of the means over seeds


def sharpness_accuracy_info(study: StudySpec, table: pd.DataFrame) -> SharpnessAccuracy:
    """Which measures there are, and their rank correlation with test accuracy.

    Args:
        study: the study.
        table: as from `minima_table.minima_table`.

    Raises:
        NothingToDraw: nothing was measured, or not in two cells.
    """
    shown = {
        name: rank_correlation(table[name], table["test_accuracy"])
        for name in CHIEF
        if name in table and (table[name].notna() & table["test_accuracy"].notna()).sum() > 1
    }
    if not shown:
        raise NothingToDraw(
            f"no sharpness of two cells was measured; run {COMMAND}, `lbstudy landscape STUDY --kind line`"
        )
    return SharpnessAccuracy(study, table, shown)


@in_style
def draw_sharpness_accuracy(info: SharpnessAccuracy) -> Figure:
    """A panel per measure, a point per cell; the larger the batch size, the larger the point."""
    encoding = Encoding.of(info.study)
    sizes = dict(zip(encoding.batch_sizes, np.linspace(3.5, 7.5, len(encoding.batch_sizes)), strict=True))
    columns = min(3, len(info.correlations))
    rows = -(-len(info.correlations) // columns)
    n = info.cells["n"][info.cells["n"] > 0]
    seeds = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    bars = "; bars: standard deviation" if n.max() > 1 else ""
    figure, axes = panels(
        info.study.name, "sharpness against test accuracy",
        f"A point per cell: mean over n = {seeds} seed{'' if n.max() == 1 else 's'}{bars}. "
        "r: rank correlation across cells with its 95% interval, which holds from about eight cells on. "
        "Right is sharper, but for the width, where left is. A network that has hardly learnt lies flat too.",
        [""] * rows, [""] * columns, width=2.2, height=1.75, sharex=False,
    )  # fmt: skip
    for panel, (name, correlation) in zip(axes.flat, info.correlations.items(), strict=False):
        shown = info.cells[np.isfinite(info.cells[name]) & info.cells["test_accuracy"].notna()]
        for cell in shown.to_dict("records"):
            look = encoding.look(cell["optimizer"], smoothing=cell["smoothing"])
            panel.errorbar(
                cell[name], cell["test_accuracy"], cell["test_accuracy_sd"], cell[f"{name}_sd"],
                ecolor=(look["color"], 0.35), elinewidth=0.8,
                **look | {"linestyle": "none", "markersize": sizes[cell["batch_size"]], "markeredgecolor": "white",
                          "markeredgewidth": 0.5},
            )  # fmt: skip
        infinite = int(np.isinf(info.cells[name]).sum())
        beyond = f"; {infinite} infinite" if infinite else ""
        interval = f" [{correlation.low:.2f}, {correlation.high:.2f}]" if np.isfinite(correlation.low) else ""
        panel.set_title(f"r = {correlation.value:.2f}{interval}, {correlation.n} cells{beyond}", size=7)
        panel.set_xlabel(MEASURES[name].label)
        if (shown[name] > 0).all() and shown[name].max() > 10 * shown[name].min():
            log_axis(panel, "x")
    for panel in list(axes.flat)[len(info.correlations) :]:
        panel.set_axis_off()
    for panel in axes[:, 0]:
        panel.set_ylabel("test accuracy")
    batches = [
        Line2D([], [], marker="o", ls="none", ms=size, color=INK, label=f"batch {batch}")
        for batch, size in sizes.items()
    ]
    encoding.legend(figure, ["optimizer", "smoothing"], batches)
    return figure
