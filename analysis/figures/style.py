"""How figures look: colour = optimizer, line style = batch size, marker = smoothing, in every one of them.

`Encoding` turns a cell into these and makes the legend; `panels` lays out small multiples under a heading that names
the study; `write` and `embeddable_svg` save. The sheet is `lbstudy.mplstyle`, in force only within `in_style`, and no
figure belongs to pyplot. The colours are Okabe and Ito's (2008), which the colour-blind can tell apart.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO, StringIO
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from lbstudy import storage
from lbstudy.storage import StoragePath
from lbstudy.study.spec import Cell, StudySpec

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F"]
"""Colours of the optimizers, in the order of the study (after Okabe & Ito 2008); with more they come round again."""

MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*"]
"""Markers of the smoothings, in the order of the study."""

LINES: list[Any] = [
    "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (4, 1.2, 1, 1.2, 1, 1.2)), (0, (8, 2)), (0, (1, 3)),
]  # fmt: skip
"""Line styles of the batch sizes, smallest first; with more than these they come round again."""

INK = "#010101"
"""Colour of text and axes; see the style sheet."""

in_style = style.context("lbstudy.analysis.figures.lbstudy")
"""Decorator of functions that draw or save: the style sheet is in force while they run."""

Format = Literal["svg", "png", "pdf"]
Channel = Literal["optimizer", "batch size", "smoothing"]


class NothingToDraw(Exception):
    """Why a figure cannot be drawn from what the study holds, in a sentence."""


class Encoding(NamedTuple):
    """What of a study's cells is told apart, and by what."""

    study: StudySpec  # says the order of colours and markers, and the names
    optimizers: list[str]
    batch_sizes: list[int]  # ascending
    smoothings: list[str]

    @classmethod
    def of(cls, study: StudySpec) -> Encoding:
        """The encoding of a study; figures of the same study agree."""
        cells = study.list_cells()
        return cls(
            study,
            list(dict.fromkeys(cell.optimizer for cell in cells)),
            sorted({cell.batch_size for cell in cells}),
            list(dict.fromkeys(cell.smoothing for cell in cells)),
        )

    def only(self, cells: Sequence[Cell]) -> Encoding:
        """Without the optimizers and smoothings that no such cell has. Batch sizes stay, for lines keep their style."""
        optimizers, smoothings = {cell.optimizer for cell in cells}, {cell.smoothing for cell in cells}
        return Encoding(
            self.study,
            [o for o in self.optimizers if o in optimizers],
            self.batch_sizes,
            [s for s in self.smoothings if s in smoothings],
        )

    def look(
        self, optimizer: str | None = None, batch_size: int | None = None, smoothing: str | None = None
    ) -> dict[str, Any]:
        """Keywords for `Axes.plot`. What is left out is drawn in ink, solid, or without a marker."""
        line = LINES[self.batch_sizes.index(batch_size) % len(LINES)] if batch_size is not None else "-"
        return {
            "color": _nth(COLOURS, self.study.cells.optimizer, optimizer) if optimizer else INK,
            "linestyle": line,
            "marker": _nth(MARKERS, self.study.cells.smoothing, smoothing) if smoothing else None,
        }

    def legend(self, figure: Figure, channels: Iterable[Channel], extra: Iterable[Artist] = ()) -> None:
        """A legend below the figure: an entry per value of each channel, and `extra` artists with their labels."""
        entries: dict[Channel, list[Artist]] = {
            "optimizer": [
                Line2D([], [], lw=3, label=self.study.label(o), color=self.look(o)["color"]) for o in self.optimizers
            ],
            "batch size": [
                Line2D([], [], label=f"batch {b}", **self.look(batch_size=b)) for b in self.batch_sizes
            ],
            "smoothing": [
                Line2D([], [], label=self.study.label(s), **self.look(smoothing=s) | {"linestyle": "none"})
                for s in self.smoothings
            ],
        }  # fmt: skip
        handles = [*(handle for channel in channels for handle in entries[channel]), *extra]
        per_row = max(2, int(figure.get_figwidth() / 1.15))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), per_row))


def _nth(looks: Sequence[str], names: Sequence[str], name: str) -> str:
    """The look of a name, of those in this order."""
    return looks[names.index(name) % len(looks)]


def panels(
    study: str, title: str, note: str, rows: Sequence[str], columns: Sequence[str], *,
    width: float = 1.75, height: float = 1.5, sharex: Any = True, sharey: Any = True, projection: str | None = None,
) -> tuple[Figure, NDArray[Any]]:  # fmt: skip
    """A grid of small multiples under a heading.

    Args:
        study: name of the study.
        title: what the figure shows.
        note: n, and what a reader must know; wrapped to the figure's width.
        rows, columns: headings of the panels; an empty one is not shown.
        width, height: of a panel, in inches.
        sharex, sharey: as in `Figure.subplots`.
        projection: of the axes, such as "3d".

    Returns:
        The figure, and its axes as an array of rows x columns.
    """
    figure = Figure(figsize=(max(4.6, 0.7 + width * len(columns)), 1.3 + height * len(rows)))
    line = int(figure.get_figwidth() * 14.5)  # characters
    text = f"{textwrap.fill(f'{study}: {title}', line)}\n{textwrap.fill(note, line)}"
    figure.suptitle(text, x=0.01, ha="left")
    axes = figure.subplots(
        len(rows), len(columns), sharex=sharex, sharey=sharey, squeeze=False, subplot_kw={"projection": projection}
    )
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title(heading)
    for axis, heading in zip(axes[:, -1], rows, strict=True):
        axis.annotate(heading, (1.02, 0.5), xycoords="axes fraction", rotation=-90, va="center", ha="left", ma="center")
    return figure, axes


def label_outer(axes: NDArray[Any], x: str, y: str | Sequence[str]) -> None:
    """Label the bottom row's x axes and the first column's y axes; `y` may be one label per row."""
    for axis in axes[-1]:
        axis.set_xlabel(x)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(y if isinstance(y, str) else y[row])


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks as plain numbers, and enough of them over less than two decades.

    Call it when the data are drawn or the limits set.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 1.0
    subs = (1.0,) if decades >= 2 else (1.0, 3.0) if decades >= 1 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def batch_size_axis(axes: Axes, batch_sizes: Sequence[int]) -> None:
    """A logarithmic x axis (base 2) with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(batch_sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(min(batch_sizes) / 1.5, max(batch_sizes) * 1.5)


def mark_empty(axes: Axes, reason: str) -> None:
    """Say in a panel why nothing is drawn there."""
    text = axes.text(0.5, 0.5, textwrap.fill(reason, 18), transform=axes.transAxes, ha="center", va="center", size=7)
    text.set_in_layout(False)  # the panel does not make room for it


_TIP = "tip: "


def tip(artist: Artist, text: str) -> None:
    """What an SVG shows of an artist to a reader who points at it."""
    artist.set_gid(_TIP + text)


def _with_tips(svg: str) -> str:
    """The groups that are named for a text have it as their title instead."""
    return re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", svg)


@in_style
def write(figure: Figure, path: StoragePath) -> None:
    """Save a figure on white; the same figure gives the same bytes."""
    undated: dict[str, dict[str, None]] = {
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
        "pdf": {"CreationDate": None},
        "png": {"Software": None},
    }
    stream, kind = BytesIO(), path.name.rpartition(".")[2]
    figure.savefig(stream, format=kind, metadata=undated[kind])
    content = stream.getvalue()
    storage.write(path, _with_tips(content.decode()).encode() if kind == "svg" else content)


@in_style
def embeddable_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an `<svg>` element for an HTML page.

    Text and axes take the colour of the text around it (`currentColor`), so the page's light and dark modes are the
    figure's too; the background is transparent. Ids begin with `name`, which makes them unique in the page, and no
    style leaks out of the element.

    Args:
        figure: the figure.
        name: a word that no other figure of the page has.
        description: what the figure shows, for those who do not see it.
    """
    stream = StringIO()
    undated = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=undated)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # `*{...}` would hold for the whole page
    svg = _with_tips(svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r">\s+<", "><", svg)  # text is drawn, so that no space between tags means anything
    svg = re.sub(r'(?<= d=")[^"]*', _rounded, svg)
    svg = svg.replace(INK, "currentColor")
    label = escape(description, quote=True)
    size = f"max-width:100%;min-width:{0.75 * figure.get_figwidth():.2f}in;height:auto"  # smaller is not legible
    head = f'<svg role="img" aria-label="{label}" style="stroke-linejoin:round;stroke-linecap:butt;{size}" '
    return svg.replace("<svg ", head, 1)


def _rounded(path: re.Match[str]) -> str:
    """Coordinates of a path to a hundredth of a point, which halves a page."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[0])
