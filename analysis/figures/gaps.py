"""What the largest batch size loses, and what of it each smoothing takes away: the numbers of the gap table, drawn.

Each is two functions: `*_info` picks the rows of the gap table, `draw_*` draws them, an interval each against the
value that a claim is judged by: no gap, and half of the gap.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lbstudy.analysis.figures.style import INK, Encoding, NothingToDraw, in_style, panels, tip
from lbstudy.study.factors import in_words
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import without_budget


class Intervals(NamedTuple):
    """Estimates with their intervals, in percent or percentage points."""

    study: StudySpec
    rows: pd.DataFrame
    """A row per estimate, from the top down: of (further factors, in words), optimizer, smoothing, batch (the two
    sizes, in words), notion (the column of the gap table), value, low and high (NaN where there is none), n."""


def gaps_info(study: StudySpec, table: pd.DataFrame) -> Intervals:
    """The gap of each optimizer at its largest batch size, with each smoothing.

    Args:
        study: the study, with whatever further factors.
        table: as from `gaps.gap_table`.

    Raises:
        NothingToDraw: no gap is known.
    """
    rows = _rows(study, table, ["gap"])
    if rows.empty:
        raise NothingToDraw("no two batch sizes have confirmed runs in common")
    return Intervals(study, rows)


def shares_info(study: StudySpec, table: pd.DataFrame) -> Intervals:
    """The shares of each optimizer's gap that its smoothings close and narrow, at its largest batch size.

    Raises:
        NothingToDraw: no share is given.
    """
    rows = _rows(study, table, ["closed", "narrowed"])
    if rows.empty:
        raise NothingToDraw("no share of a gap is given; the table of gaps says why")
    return Intervals(study, rows)


def _rows(study: StudySpec, table: pd.DataFrame, notions: Sequence[str]) -> pd.DataFrame:
    largest = table[table["large_batch"] == table.groupby("optimizer")["large_batch"].transform("max")]
    found = []
    for row in largest.to_dict("records"):
        of = in_words(without_budget(tuple((key, row[key]) for key in study.factors)))
        batch = f"{row['small_batch']} to {row['large_batch']}"
        for notion in notions:
            value, low, high = (100 * float(row[f"{notion}{end}"]) for end in ("", "_low", "_high"))
            n = row["n" if notion == "gap" else f"{notion}_n"]
            found.append((of, row["optimizer"], row["smoothing"], batch, notion, value, low, high, n))
    names = ["of", "optimizer", "smoothing", "batch", "notion", "value", "low", "high", "n"]
    return pd.DataFrame(found, columns=names).dropna(subset="value", ignore_index=True)


class Scale(NamedTuple):
    """What the estimates are held against, and along which axis."""

    label: str
    threshold: float
    widest: tuple[float, float]  # what lies beyond is cut off


@in_style
def draw_gaps(info: Intervals, at_most: int | None = None) -> Figure:
    """A line per optimizer and smoothing, against no gap; `at_most` combinations of further factors are drawn."""
    note = "Test accuracy at the smallest batch minus that at the largest, paired by seed, mean and 95 % interval."
    scale = Scale("percentage points that the large batch loses", 0, (-100, 100))
    return _draw(info, "the gap between batch sizes", note, scale, at_most)


@in_style
def draw_shares(info: Intervals, at_most: int | None = None) -> Figure:
    """Two lines per optimizer and smoothing, closed and narrowed, against one half."""
    note = "Closed: against the plain small batch; narrowed: both batch sizes smoothed. 95 % intervals."
    scale = Scale("% of the gap without smoothing", 50, (-100, 200))
    return _draw(info, "how much of the gap is taken away", note, scale, at_most)


def _draw(info: Intervals, title: str, note: str, scale: Scale, at_most: int | None) -> Figure:
    """A panel per combination of further factors."""
    encoding = Encoding.of(info.study)
    every = list(dict.fromkeys(info.rows["of"]))
    parts = [info.rows[info.rows["of"] == of] for of in every[:at_most]]
    height = 0.45 + 0.2 * max(map(len, parts))
    if len(parts) < len(every):
        note += f" {len(every) - len(parts)} more combinations are in the file that `lbstudy figures` writes."
    ends = info.rows[["low", "value", "high"]].to_numpy(float)
    low, high = np.nanmin([*ends.flat, scale.threshold]), np.nanmax([*ends.flat, scale.threshold])
    if low < scale.widest[0] or high > scale.widest[1]:
        note += " Cut off at the edges."
        low, high = max(low, scale.widest[0]), min(high, scale.widest[1])
    room = 0.05 * (high - low)
    figure, grid = panels(
        info.study.name, title, note, [textwrap.fill(of, int(15 * height)) for of in every[:at_most]], [""],
        width=4.2, height=height, sharey=False,
    )  # fmt: skip
    grid[0, 0].set_xlim(low - room, high + room)
    grid[-1, 0].set_xlabel(scale.label)
    for panel, part in zip(grid[:, 0], parts, strict=True):
        panel.axvline(scale.threshold, color=INK, lw=0.9, ls="--")
        for place, row in enumerate(part.itertuples()):
            look = encoding.look(row.optimizer, smoothing=row.smoothing)
            hollow = {"fillstyle": "none"} if row.notion == "narrowed" else {}
            panel.hlines(place, row.low, row.high, color=look["color"], lw=1)
            (mark,) = panel.plot(row.value, place, **look | {"linestyle": "none"} | hollow)
            interval = "" if np.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]"
            of = "points" if row.notion == "gap" else f"% {row.notion}"
            who = f"{info.study.label(row.optimizer)}, {info.study.label(row.smoothing)}, batch {row.batch}"
            tip(mark, f"{who}: {row.value:.2f} {of}{interval}, n = {row.n}")
        names = [f"{info.study.label(row.optimizer)}, {info.study.label(row.smoothing)}" for row in part.itertuples()]
        panel.set_yticks(range(len(part)), names)
        panel.set_ylim(len(part) - 0.4, -0.6)
        panel.grid(visible=False, axis="y")
    if "narrowed" in set(info.rows["notion"]):
        plain: dict[str, Any] = {"marker": "o", "ls": "none", "color": INK}
        kinds = [Line2D([], [], label="closed", **plain), Line2D([], [], label="narrowed", fillstyle="none", **plain)]
        figure.legend(handles=kinds, loc="outside lower center", ncols=2)
    return figure
