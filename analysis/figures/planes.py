"""Figures of planes through weight space: training loss around minima, and along a run's path.

Each is two functions: `*_info` computes what is shown, `draw_*` draws it. Contours lie at the same levels in every
panel and figure, 0.1 to 10 as in Li et al. (2018), but evenly spaced in the logarithm, for minima differ below 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from lbstudy.analysis.figures.landscape import HATCH, NOT_FINITE, describe, of_winners
from lbstudy.analysis.figures.style import Encoding, in_style, label_outer, mark_empty, panels
from lbstudy.analysis.minima.results import Kind
from lbstudy.study.spec import StudySpec

LEVELS: NDArray[np.float64] = np.geomspace(0.1, 10, 13)
"""Of the contours of the training loss: six to a decade."""

TICKS = [0.1, 0.3, 1, 3, 10]

COLOURS = "viridis_r"
LOST = "#8A8A8A"
"""Of crosses, in three dimensions, where the loss is not finite."""

PATH = "#D1105A"
"""Of a run's path: seen against every colour of the contours."""

Array = NDArray[np.float64]


class Plane(NamedTuple):
    """Training loss on a grid around one run's final weights, which are at (0, 0)."""

    number: int  # of the confirmed run
    repeat: int
    a: Array
    b: Array
    loss: Array  # b x a, as contours take it; NaN where not finite
    missing: NDArray[np.bool_]  # b x a; not evaluated


class Planes(NamedTuple):
    """A plane of every cell that has one."""

    study: StudySpec
    planes: dict[str, Plane]  # by cell
    note: str  # how the landscape was looked at, and what is missing


class Trajectories(NamedTuple):
    """The plane of each cell's run, and the run's path through it."""

    planes: Planes
    paths: dict[str, Array]  # cell -> checkpoints x 2, in their order, the final weights last
    explained: dict[str, tuple[float, float]]  # cell -> share of the checkpoints' variance along either axis


def plane_info(study: StudySpec, points: pd.DataFrame, settings: Mapping[str, Any], kind: Kind = "plane") -> Planes:
    """The plane around each cell's best configuration: that of its first seed that has one.

    Args:
        study: the study.
        points: as from `results.landscape`.
        settings: as from `results.landscape_settings`; may be empty.
        kind: plane or trajectory.

    Raises:
        NothingToDraw: no plane was evaluated.
    """
    points = of_winners(points, kind)
    first = points.groupby("cell")["repeat"].transform("min")
    left_out = points.attrs
    points = points[points["repeat"] == first]
    points.attrs = left_out
    planes = {}
    for cell, of_cell in points.groupby("cell", sort=False):
        grid = of_cell.pivot_table(index="b", columns="a", values="train_loss", dropna=False, aggfunc="last")
        evaluated = of_cell.assign(there=True).pivot_table(index="b", columns="a", values="there", aggfunc="any")
        loss = grid.to_numpy(float)
        planes[str(cell)] = Plane(
            int(of_cell["number"].iloc[0]), int(of_cell["repeat"].iloc[0]),
            grid.columns.to_numpy(float), grid.index.to_numpy(float),
            np.where(np.isfinite(loss), loss, np.nan), evaluated.isna().to_numpy(),
        )  # fmt: skip
    return Planes(study, planes, describe(points, kind, settings))


def trajectory_info(
    study: StudySpec, points: pd.DataFrame, paths: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Trajectories:
    """The run of each cell on the plane that holds most of its path.

    Args:
        study: the study.
        points: as from `results.landscape` with kind trajectory.
        paths: as from `results.trajectories`; a plane without its path is shown all the same.

    Raises:
        NothingToDraw: no plane was evaluated.
    """
    planes = plane_info(study, points, {}, "trajectory")
    found = {cell: paths[cell, plane.number] for cell, plane in planes.planes.items() if (cell, plane.number) in paths}
    missing = [cell for cell in planes.planes if cell not in found]
    if missing:
        planes = planes._replace(note=f"{planes.note} No path: {', '.join(missing)}.")
    return Trajectories(
        planes,
        {cell: np.asarray(path["path"], float) for cell, path in found.items()},
        {cell: tuple(path["explained"]) for cell, path in found.items()},
    )


@in_style
def draw_plane(info: Planes) -> Figure:
    """Contours of the training loss, a panel per cell."""
    figure, axes = _panels(
        info, "training loss on a plane of two random directions, L(θ*\u00a0+\u00a0a\u00a0δ\u00a0+\u00a0b\u00a0η)"
    )
    for panel, _, plane in _each(info, axes):
        _contours(panel, plane)
        panel.plot(0, 0, "+", color="#010101", ms=5, mew=1)
    for panel in axes.flat:
        panel.set_aspect("equal")
    label_outer(axes, "a", "b")
    _key(figure, axes, _hatched(info))
    return figure


@in_style
def draw_surface(info: Planes) -> Figure:
    """The same planes in three dimensions; height is the logarithm of the loss."""
    with rc_context({"grid.color": "#D9D9D9"}):  # three-dimensional axes heed no transparency of their grid
        figure, axes = _panels(
            info,
            "training loss over a plane of two random directions; height and colour: logarithm of the loss, cut off at "
            f"{LEVELS[-1]:g}",
            projection="3d", sharex=False, sharey=False,
        )  # fmt: skip
    losses = np.concatenate([plane.loss[np.isfinite(plane.loss)] for plane in info.planes.values()])
    positive = losses[losses > 0]
    lowest = np.floor(np.log10(positive.min())) if len(positive) else -1.0
    low, high = max(lowest, -3.0), 1.0
    for panel, _, plane in _each(info, axes):
        a, b = np.meshgrid(plane.a, plane.b)
        with np.errstate(divide="ignore"):  # a loss of 0 lies on the floor
            height = np.clip(np.log10(plane.loss), low, high)
        colours = colormaps[COLOURS](_norm()(plane.loss))
        panel.plot_surface(a, b, height, facecolors=colours, rstride=1, cstride=1, linewidth=0, shade=False)
        lost = _lost(plane)
        panel.scatter(a[lost], b[lost], np.full(lost.sum(), high), marker="x", color=LOST, s=4)
        panel.set_zlim(low, high)
        panel.zaxis.set_major_locator(FixedLocator(np.arange(low, high + 1).tolist()))
        panel.zaxis.set_major_formatter(lambda value, _: f"{10.0**value:g}")
        panel.view_init(elev=28, azim=-60)
        panel.tick_params(labelsize=5, pad=-4)
        for name, axis in (("a", panel.xaxis), ("b", panel.yaxis)):
            axis.set_major_locator(MaxNLocator(2))
            axis.set_label_text(name)
            axis.labelpad = -12
    for panel, name in zip(axes[:, 0], _rows(info.study), strict=True):
        panel.text2D(-0.08, 0.5, name, transform=panel.transAxes, rotation=90, va="center", ha="right")
    any_lost = any(_lost(plane).any() for plane in info.planes.values())
    cross = Line2D([], [], marker="x", ls="none", ms=3, color=LOST, label=NOT_FINITE)
    _key(figure, axes, [cross] if any_lost else [])
    return figure


@in_style
def draw_trajectory(info: Trajectories) -> Figure:
    """Contours of the training loss and the run's path over them, a panel per cell, each with axes of its own."""
    planes = info.planes
    figure, axes = _panels(
        planes,
        "the path of a run over its training loss, on the first two principal components of its checkpoints (share of "
        "their variance); Euclidean distances",
        sharex=False, sharey=False, width=2.05, height=1.9,
    )  # fmt: skip
    shown = _each(planes, axes)
    for panel in {*axes.flat} - {panel for panel, _, _ in shown}:
        panel.set(xticks=[], yticks=[])
    for panel, cell, plane in shown:
        _contours(panel, plane)
        for which, axis in enumerate((panel.xaxis, panel.yaxis)):
            share = f" ({info.explained[cell][which]:.0%})" if cell in info.explained else ""
            axis.set_label_text(f"component {which + 1}{share}", size=6.5)
            axis.labelpad = 1
            axis.set_major_locator(MaxNLocator(4))
        if cell not in info.paths:
            continue
        path = info.paths[cell]
        panel.plot(*path.T, "-", color=PATH, lw=1)
        panel.plot(*path[1:-1].T, ".", color=PATH, ms=3)
        panel.plot(*path[0], "o", color=PATH, ms=5, mfc="white", mew=1.2)
        panel.plot(*path[-1], "*", color=PATH, ms=8, mec="white", mew=0.5)
    marks = [
        Line2D([], [], color=PATH, marker="o", mfc="white", mew=1.2, ms=5, lw=1, label="first checkpoint"),
        Line2D([], [], color=PATH, marker="*", mec="white", mew=0.5, ms=8, lw=1, label="final weights"),
    ]
    _key(figure, axes, [*marks, *_hatched(planes)])
    return figure


def _rows(study: StudySpec) -> dict[str, tuple[str, int]]:
    """Headings of the rows of panels: optimizer and batch size."""
    return {f"{cell.optimizer} {cell.batch_size}": (cell.optimizer, cell.batch_size) for cell in study.list_cells()}


def _panels(info: Planes, title: str, **options: Any) -> tuple[Figure, NDArray[Any]]:
    repeats = {plane.repeat for plane in info.planes.values()}
    of = "the first seed" if repeats == {0} else "the first seed that was evaluated"
    return panels(
        info.study.name, title, f"n = 1: of each cell, {of}. {info.note}",
        [""] * len(_rows(info.study)) if "projection" in options else list(_rows(info.study)),
        Encoding.of(info.study).smoothings, **{"width": 1.75, "height": 1.6} | options,
    )  # fmt: skip


def _each(info: Planes, axes: NDArray[Any]) -> list[tuple[Any, str, Plane]]:
    """Each panel that has something to show, its cell, and that; the others say that they have not."""
    rows, columns = list(_rows(info.study).values()), Encoding.of(info.study).smoothings
    names: dict[tuple[str, int, str], str] = {
        (cell.optimizer, cell.batch_size, cell.smoothing): cell.name for cell in info.study.list_cells()
    }
    found = []
    for row, (optimizer, batch_size) in enumerate(rows):
        for column, smoothing in enumerate(columns):
            cell = names.get((optimizer, batch_size, smoothing), "")
            if cell in info.planes:
                found.append((axes[row, column], cell, info.planes[cell]))
            elif axes[row, column].name == "3d":
                axes[row, column].text2D(
                    0.5, 0.5, "no landscape", transform=axes[row, column].transAxes, ha="center", size=7
                )
                axes[row, column].set_axis_off()
            else:
                mark_empty(axes[row, column], "no landscape")
    return found


def _contours(panel: Axes, plane: Plane) -> None:
    """Filled contours and lines; hatched where the loss is not finite, blank where it was not evaluated."""
    panel.grid(False)
    if min(plane.loss.shape) < 2:
        mark_empty(panel, "too few points")
        return
    panel.set_xlim(plane.a[0], plane.a[-1])
    panel.set_ylim(plane.b[0], plane.b[-1])
    loss = np.ma.masked_invalid(plane.loss)
    if loss.count():
        panel.contourf(plane.a, plane.b, loss, LEVELS, norm=_norm(), cmap=COLOURS, extend="both")
        if loss.min() < LEVELS[-1] and loss.max() > LEVELS[0]:
            panel.contour(plane.a, plane.b, loss, LEVELS, colors="#010101", linewidths=0.3, alpha=0.6)
    lost = _lost(plane)
    if lost.any():
        # A level just above 0: up to the nearest points that are finite.
        hatched = panel.contourf(plane.a, plane.b, lost.astype(float), [1e-6, 2], colors="none", hatches=["/////"])
        hatched.set(edgecolor=HATCH["edgecolor"], alpha=HATCH["alpha"], linewidth=0)


def _lost(plane: Plane) -> NDArray[np.bool_]:
    """Where the loss was evaluated and is not finite."""
    return np.isnan(plane.loss) & ~plane.missing


def _norm() -> LogNorm:
    return LogNorm(LEVELS[0], LEVELS[-1])


def _hatched(info: Planes) -> list[Patch]:
    return [Patch(label=NOT_FINITE, **HATCH)] if any(_lost(p).any() for p in info.planes.values()) else []


def _key(figure: Figure, axes: NDArray[Any], handles: Sequence[Artist]) -> None:
    """The colours' scale, and a legend of marks where there are any."""
    bar = figure.colorbar(ScalarMappable(_norm(), COLOURS), ax=axes, extend="both", aspect=40, pad=0.02)
    bar.set_label("training loss")
    bar.ax.yaxis.set_major_locator(FixedLocator(TICKS))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if handles:
        figure.legend(handles=list(handles), loc="outside lower center", ncols=len(handles))
