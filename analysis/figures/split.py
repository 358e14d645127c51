"""The gap between batch sizes and its parts: from the small batch's accuracy down to the large one's, in two steps.

A panel per smoothing, and in it for each optimizer three bars: what few updates cost, what less noise in the gradient
costs from there on, and the gap, which is both. A part that is a gain goes up instead.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lbstudy.analysis.figures.style import INK, Encoding, NothingToDraw, in_style, label_outer, mark_empty, panels
from lbstudy.analysis.tables.split import PARTS_OF_GAP, Part, Split, list_splits
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import FEWER_UPDATES, SAME_UPDATES, part_of, whole

Bar = Part | Literal["gap"]

BARS: dict[Bar, float] = {"few_updates": 0.9, "less_noise": 0.45, "gap": 0.12}
"""What the bars are, and how opaque."""

MOST_ROOM = 0.5
"""How far beyond bars and seeds intervals are drawn, as a share of their range."""

WIDTH = 0.26
"""Of a bar, where optimizers are 1 apart."""


class SplitGaps(NamedTuple):
    """The parts of gaps, in points of test accuracy."""

    study: StudySpec
    bars: pd.DataFrame
    """A row per optimizer, smoothing, way of splitting and bar: optimizer, smoothing, budget, bar (of BARS), bottom,
    value, low and high (of the value; NaN without an interval), n (seeds)."""
    seeds: pd.DataFrame  # the same columns but low, high and n, a row per repeat
    sizes: dict[str, tuple[int, int]]  # way of splitting -> small and large batch size


def split_info(study: StudySpec, confirmed: pd.DataFrame, variant: StudySpec | None = None) -> SplitGaps:
    """Put the parts of each gap, at the largest batch size, one onto the other.

    Args:
        study: the study.
        confirmed: as from `load.confirmed`.
        variant: of which gaps are drawn; default: the study.

    Raises:
        NothingToDraw: no gap is known with its parts.
    """
    variant = variant or study
    factors = {cell.factors for cell in variant.list_cells()}
    mine = [split for split in list_splits(study, confirmed) if whole(split.between.factors) in factors]
    largest = max((split.large.batch_size for split in mine), default=0)
    bars, seeds, sizes = [], [], {}
    for split in (split for split in mine if split.large.batch_size == largest and len(split.accuracies)):
        way = str(part_of(split.between.factors))
        key = {"optimizer": split.large.optimizer, "smoothing": split.large.smoothing, "budget": way}
        sizes[way] = (split.small.batch_size, largest)
        bottom = 0.0
        for name in BARS:
            estimate = split.gap if name == "gap" else split.cost(name)
            value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
            start = 0.0 if name == "gap" else bottom
            bars.append(
                key | {"bar": name, "bottom": start, "value": value, "low": low, "high": high, "n": split.gap.n}
            )
            seeds += [key | {"bar": name, "bottom": start, "value": one} for one in 100 * _each(split, name)]
            bottom += value
    if not bars:
        raise NothingToDraw("no gap has confirmed runs of the three cells that its parts need")
    return SplitGaps(variant, pd.DataFrame(bars), pd.DataFrame(seeds), sizes)


def _each(split: Split, bar: Bar) -> np.ndarray:
    """A bar's value at each repeat."""
    if bar == "gap":
        return (split.accuracies["small"] - split.accuracies["large"]).to_numpy(float)
    return split.lost(bar).to_numpy(float)


@in_style
def draw_split(info: SplitGaps) -> Figure:
    """A row per way of splitting, a column per smoothing; points are single seeds."""
    encoding, ways = Encoding.of(info.study), [way for way in (SAME_UPDATES, FEWER_UPDATES) if way in info.sizes]
    n = info.bars["n"]
    counts = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    brackets = "; lines: 95 % intervals, paired by seed" if n.max() > 1 else ", which has no interval"
    low, high, is_cut = _limits(info)
    cut_off = " Lines are cut off at the edges." if is_cut else ""
    figure, axes = panels(
        info.study.name, "what the large batch loses, by cause",
        f"Of n = {counts} confirmed seed{'' if n.max() == 1 else 's'}{brackets}; points: single seeds. "
        f"The two parts add up to the gap.{cut_off}",
        [_row_heading(way, *info.sizes[way]) for way in ways], [info.study.label(s) for s in encoding.smoothings],
        height=1.9, width=2.0,
    )  # fmt: skip
    axes[0, 0].set_ylim(low, high)  # which all panels share
    for row, way in enumerate(ways):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            here = [f[(f["budget"] == way) & (f["smoothing"] == smoothing)] for f in (info.bars, info.seeds)]
            panel.grid(visible=False, axis="x")
            panel.axhline(0, color=INK, lw=0.6)
            for place, optimizer in enumerate(encoding.optimizers):
                for offset, bar in enumerate(BARS):
                    x = place + (offset - 1) * WIDTH
                    bars, seeds = (f[(f["optimizer"] == optimizer) & (f["bar"] == bar)] for f in here)
                    _draw_bar(panel, x, bars, seeds, encoding.look(optimizer)["color"])
            if here[0].empty:
                mark_empty(panel, "nothing confirmed")
            panel.set_xticks(range(len(encoding.optimizers)), [info.study.label(o) for o in encoding.optimizers])
            panel.set_xlim(-0.55, len(encoding.optimizers) - 0.45)
    label_outer(axes, "", "points of test accuracy")
    words = [*PARTS_OF_GAP.values(), "the gap"]
    looks = zip(BARS.values(), words, strict=True)
    extra = [Patch(facecolor=INK, alpha=alpha, edgecolor=INK, label=label) for alpha, label in looks]
    encoding.legend(figure, ["optimizer"], extra)
    return figure


def _limits(info: SplitGaps) -> tuple[float, float, bool]:
    """The ends of the vertical axis, and whether intervals reach beyond: those of two seeds would flatten all bars."""
    ends = info.bars[["low", "high"]].add(info.bars["bottom"], axis=0).to_numpy(float)
    bars = (info.bars["bottom"] + info.bars["value"]).to_numpy(float)
    inner = np.array([0.0, *bars, *(info.seeds["bottom"] + info.seeds["value"])])
    low, high = inner.min(), inner.max()
    room = MOST_ROOM * (high - low)
    reach = np.array([*inner, *ends[np.isfinite(ends)]])
    margin = 0.05 * (high - low)
    bottom, top = max(reach.min(), low - room) - margin, min(reach.max(), high + room) + margin
    return bottom, top, bool(reach.min() < bottom or reach.max() > top)


def _draw_bar(panel: Axes, x: float, bars: pd.DataFrame, seeds: pd.DataFrame, colour: str) -> None:
    for name, bottom, value, low, high in bars[["bar", "bottom", "value", "low", "high"]].to_numpy():
        opaque = BARS[name]
        panel.bar(x, value, 0.92 * WIDTH, bottom=bottom, color=colour, alpha=opaque, lw=0.6, edgecolor=colour)
        panel.vlines(x, bottom + low, bottom + high, color=INK, lw=0.9)
    shift = np.linspace(-0.25, 0.25, len(seeds)) * WIDTH if len(seeds) > 1 else np.zeros(len(seeds))
    panel.plot(
        x + shift, seeds["bottom"] + seeds["value"], ls="none", marker="o", ms=1.8, color=INK, mfc="white", mew=0.5
    )


def _row_heading(way: str, small: int, large: int) -> str:
    if way == SAME_UPDATES:
        return f"{large} with the\nupdates of {small}"
    return f"{small} with the\nupdates of {large}"
