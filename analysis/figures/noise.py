"""The gradient noise scale along training, with the batch sizes that the runs were trained with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lbstudy.analysis.figures.style import (
    INK,
    Encoding,
    NothingToDraw,
    in_style,
    label_outer,
    log_axis,
    mark_empty,
    panels,
)  # fmt: skip
from lbstudy.analysis.tables.best import winners
from lbstudy.study.spec import StudySpec


class NoiseScales(NamedTuple):
    """Noise scales of the cells' first confirmed runs."""

    study: StudySpec
    points: pd.DataFrame
    """A row per cell, epoch and `smoothed`: cell, optimizer, batch_size, smoothing, epoch, smoothed, scale (NaN where
    the gradient cannot be told from zero), scale_error."""


def noise_scales_info(study: StudySpec, measured: pd.DataFrame) -> NoiseScales:
    """The course of each cell's run that has kept most of its models, from the smallest mini-batches.

    Raises:
        NothingToDraw: nothing was measured.
    """
    best = winners(measured)
    if best.empty:
        raise NothingToDraw("no gradient noise was measured; run `lbstudy noise STUDY`")
    parts = []
    for _, of_cell in best.groupby("cell", sort=False):
        run = of_cell[of_cell["number"] == of_cell.groupby("number")["epoch"].nunique().idxmax()]
        parts.append(run[run["mini_batch"] == run["mini_batch"].min()])
    points = pd.concat(parts, ignore_index=True).sort_values("epoch", ignore_index=True)
    return NoiseScales(study, points.assign(scale=points["scale"].where(np.isfinite(points["scale"]))))


@in_style
def draw_noise_scales(info: NoiseScales) -> Figure:
    """A panel per batch size and smoothing; a line per optimizer, and the batch size itself across."""
    encoding = Encoding.of(info.study)
    figure, axes = panels(
        info.study.name, "gradient noise scale along training",
        "tr(Σ) / |G|² of one run a cell, with its error over mini-batches. Pale: without the smoothing of the run's "
        "training. Dashed: the batch size; where the curve is above it, a mini-batch is mostly noise.",
        [f"batch {size}" for size in encoding.batch_sizes], encoding.smoothings,
    )  # fmt: skip
    for row, batch_size in enumerate(encoding.batch_sizes):
        for column, smoothing in enumerate(encoding.smoothings):
            panel, points = axes[row, column], info.points
            here = points[(points["batch_size"] == batch_size) & (points["smoothing"] == smoothing)]
            panel.axhline(batch_size, color=INK, ls="--", lw=0.8)
            for (optimizer, smoothed), line in here.groupby(["optimizer", "smoothed"]):
                look = encoding.look(str(optimizer), smoothing=smoothing)
                pale = 0.4 if smoothing != "none" and not smoothed else 1
                panel.plot(line["epoch"], line["scale"], ms=3, lw=1, alpha=pale, **look)
                low, high = line["scale"] - line["scale_error"], line["scale"] + line["scale_error"]
                low = low.clip(lower=line["scale"] / 10)  # the axis is logarithmic
                panel.vlines(line["epoch"], low, high, color=look["color"], lw=0.6, alpha=pale)
            if here.empty:
                mark_empty(panel, "not measured")
    for panel in axes.flat:
        log_axis(panel, "y")
        panel.xaxis.get_major_locator().set_params(integer=True)
    label_outer(axes, "epochs", "noise scale")
    encoding.legend(
        figure, ["optimizer", "smoothing"], [Line2D([], [], color=INK, ls="--", lw=0.8, label="batch size")]
    )
    return figure
