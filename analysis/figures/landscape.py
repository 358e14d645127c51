"""Figures of loss and accuracy along lines through weight space: around minima, and from one to another.

Each is two functions: `*_info` computes what is shown, `draw_*` draws it. The curves look as in Li et al. (2018) and
in the HPML 2019 slides: loss blue on the left axis, accuracy red on the right one, training solid, test dashed. A wide
valley is a flat minimum, a narrow one a sharp minimum. A loss that is NaN or infinite lies above every other loss, an
accuracy without a number below every other accuracy; so both count in medians and bands, and are marked where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lbstudy.analysis.figures.style import INK, Encoding, NothingToDraw, in_style, label_outer, mark_empty, panels
from lbstudy.analysis.minima.curves import spread
from lbstudy.analysis.minima.results import Kind, list_incomplete
from lbstudy.analysis.rules import CHANGES
from lbstudy.analysis.tables.best import winners
from lbstudy.study.spec import StudySpec

LOSS_AXIS = (0.0, 5.0)
"""What of the loss is shown, in every panel, as in Li et al. (2018)."""

LOSS, ACCURACY = "#1F4FBF", "#C1121F"
METRICS = {
    "train_loss": (LOSS, "-", "training loss"),
    "test_loss": (LOSS, (0, (3, 1.2)), "test loss"),
    "train_accuracy": (ACCURACY, "-", "training accuracy"),
    "test_accuracy": (ACCURACY, (0, (3, 1.2)), "test accuracy"),
}
"""Metric -> colour, line style, label."""

HATCH: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "alpha": 0.35, "hatch": "/////", "linewidth": 0}
"""How regions look where the loss is not finite."""

NOT_FINITE = "loss NaN or infinite"


class Curves(NamedTuple):
    """Metrics along lines, summarised over each cell's curves."""

    study: StudySpec
    points: pd.DataFrame
    """A row per cell, metric and point: cell, optimizer, batch_size, smoothing, metric, a, median, low and high (first
    and third quartile), lost (share of curves without a finite value there), n (curves)."""
    curves: str  # how many curves a cell has, in words
    note: str  # how the landscape was looked at, and what is missing


def line_info(study: StudySpec, lines: pd.DataFrame, settings: Mapping[str, Any]) -> Curves:
    """f(a) = L(theta* + a delta) around each cell's best configuration: medians and quartiles over all curves, one per
    direction and seed.

    Args:
        study: the study.
        lines: as from `results.landscape` with kind line.
        settings: as from `results.landscape_settings`; may be empty.

    Raises:
        NothingToDraw: no line was evaluated.
    """
    lines = of_winners(lines, "line")
    count = _range(lines.groupby("cell")["direction"].nunique()), _range(_seeds(lines))
    words = f"n = {count[0]} random directions × {count[1]} seed{'' if count[1] == '1' else 's'}"
    return Curves(study, _summarise(lines), words, describe(lines, "line", settings))


def interpolation_info(study: StudySpec, lines: pd.DataFrame) -> Curves:
    """Loss and accuracy from the small-batch solution (a = 0) to the large-batch one (a = 1) of the same optimizer,
    smoothing and seed: medians and quartiles over seeds. Rows are those of the large-batch cells.

    Args:
        study: the study.
        lines: as from `results.landscape` with kind interpolate.

    Raises:
        NothingToDraw: no interpolation was evaluated.
    """
    lines = of_winners(lines, "interpolate")
    seeds = _range(_seeds(lines))
    words = f"n = {seeds} seed{'' if seeds == '1' else 's'}"
    return Curves(study, _summarise(lines), words, describe(lines, "interpolate", {}))


def of_winners(points: pd.DataFrame, kind: Kind) -> pd.DataFrame:
    """Of the points of landscapes, those around runs of what is now each cell's best configuration.

    Raises:
        NothingToDraw: there are none.
    """
    left_out = points.attrs.get("left_out", [])
    chosen = winners(points)
    if outdated := points.attrs.get("outdated", []):
        raise NothingToDraw(
            f"the {len(outdated)} files were made by an older rule ({CHANGES[kind]}); remove the study's folder "
            f"`landscape/{kind}` and run `lbstudy landscape STUDY --kind {kind}`"
        )
    if chosen.empty:
        damaged = f" ({len(left_out)} damaged files were left out)" if left_out else ""
        what = "of what are now the best configurations" if len(points) else "was evaluated"
        raise NothingToDraw(f"no landscape {what}{damaged}; run `lbstudy landscape STUDY --kind {kind}`")
    return chosen


def describe(points: pd.DataFrame, kind: Kind, settings: Mapping[str, Any]) -> str:
    """How landscapes were looked at, on how many samples, and which are incomplete, in sentences."""
    sentences = []
    if settings:
        moved = "all parameters" if settings.get("biases_and_norms") else "weights only, no biases or norm parameters"
        normalisation = settings.get("normalisation")
        name = "plain Gaussian" if normalisation == "none" else f"{normalisation}-normalised Gaussian"
        sentences.append(f"Directions: {name}, {moved}, seed {settings.get('seed')}.")
    train, test = (_range(points[f"{part}_samples"].astype(int)) for part in ("train", "test"))
    sentences.append(f"Evaluated on {train} training and {test} test samples.")
    if incomplete := list_incomplete(points, kind):
        runs = [f"{run.cell} run {run.number} ({run.points} of {run.wanted} points)" for run in incomplete]
        sentences.append(f"Incomplete: {', '.join(runs)}.")
    if left_out := points.attrs.get("left_out", []):
        sentences.append(f"Files left out, damaged or of no known run: {', '.join(left_out)}.")
    return " ".join(sentences)


def _seeds(points: pd.DataFrame) -> pd.Series:
    return points.groupby("cell")["repeat"].nunique()


def _range(counts: pd.Series) -> str:
    """Numbers in words: "5", or "3 to 5"."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _summarise(lines: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles at each point, over all curves of a cell. What is not finite is worst of all."""
    key = ["cell", "optimizer", "batch_size", "smoothing", "a"]
    parts = []
    for metric in METRICS:
        worst = np.inf if metric.endswith("loss") else -np.inf
        values = lines[metric].where(np.isfinite(lines[metric]), worst)
        rows = [
            (*at, *spread(curves), 1 - np.isfinite(curves).mean(), len(curves))
            for at, curves in values.groupby([lines[name] for name in key], sort=False)
        ]
        parts.append(pd.DataFrame(rows, columns=[*key, "median", "low", "high", "lost", "n"]).assign(metric=metric))
    return pd.concat(parts).sort_values(["cell", "metric", "a"], ignore_index=True)


@in_style
def draw_line(info: Curves) -> Figure:
    """A panel per cell: rows are optimizers and batch sizes, columns smoothings."""
    encoding = Encoding.of(info.study)
    cells = info.study.list_cells()
    rows = list(dict.fromkeys((cell.optimizer, cell.batch_size) for cell in cells))
    figure, axes = panels(
        info.study.name, "loss and accuracy around the minima, f(a)\u00a0=\u00a0L(θ*\u00a0+\u00a0a\u00a0δ)",
        f"Median and quartiles over {info.curves}. {info.note} {_clipped()}",
        [""] * len(rows), encoding.smoothings, height=1.3,
    )  # fmt: skip
    for row, (optimizer, batch_size) in enumerate(rows):
        for column, smoothing in enumerate(encoding.smoothings):
            chosen = {"optimizer": optimizer, "batch_size": batch_size, "smoothing": smoothing}
            _draw_metrics(axes[row, column], _of(info.points, **chosen), column == len(encoding.smoothings) - 1)
    label_outer(axes, "a", [f"{optimizer} {batch_size}\nloss" for optimizer, batch_size in rows])
    _legend(figure, info.points)
    return figure


@in_style
def draw_interpolation(info: Curves) -> Figure:
    """A panel per large-batch cell, with the two solutions marked."""
    encoding = Encoding.of(info.study)
    cells = [cell for cell in info.study.list_cells() if (info.points["cell"] == cell.name).any()]
    rows = list(dict.fromkeys((cell.optimizer, cell.batch_size) for cell in cells))
    smallest = {o: min(c.batch_size for c in info.study.list_cells() if c.optimizer == o) for o in encoding.optimizers}
    figure, axes = panels(
        info.study.name, "from the small-batch (a = 0) to the large-batch (a = 1) solution",
        f"(1 - a) SB + a LB, running variances geometrically; median and quartiles over {info.curves}. {info.note} "
        f"{_clipped()} Do not read off flatness here: which side looks sharper turns round with weight decay.",
        [""] * len(rows), encoding.smoothings, height=1.45,
    )  # fmt: skip
    for row, (optimizer, batch_size) in enumerate(rows):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            chosen = {"optimizer": optimizer, "batch_size": batch_size, "smoothing": smoothing}
            points = _of(info.points, **chosen)
            _draw_metrics(panel, points, column == len(encoding.smoothings) - 1)
            for solution in (0, 1) if len(points) else ():
                panel.axvline(solution, color=INK, lw=0.8, ls=":")
    label_outer(axes, "a", [f"{optimizer} {smallest[optimizer]} to {size}\nloss" for optimizer, size in rows])
    _legend(figure, info.points, [Line2D([], [], color=INK, lw=0.8, ls=":", label="the two solutions")])
    return figure


@in_style
def draw_widths(info: Curves) -> Figure:
    """Training loss around several minima in one panel: a column per optimizer; above, its batch sizes without
    smoothing; below, the smoothings at its largest batch size."""
    encoding = Encoding.of(info.study)
    points = info.points[info.points["metric"] == "train_loss"]
    plain = encoding.smoothings[0]
    figure, axes = panels(
        info.study.name, "training loss around the minima, compared",
        f"Above: batch sizes, {_without(plain)}. Below: smoothings at the largest batch size. "
        f"Median and quartiles over {info.curves}. A wider valley is a flatter minimum, if its floor is low. "
        f"{info.note} {_clipped()}",
        ["batch sizes", "smoothings"] if len(encoding.smoothings) > 1 else ["batch sizes"], encoding.optimizers,
        width=2.6, height=2.0,
    )  # fmt: skip
    for column, optimizer in enumerate(encoding.optimizers):
        of_optimizer = points[points["optimizer"] == optimizer]
        for row, panel in enumerate(axes[:, column]):
            here = of_optimizer[of_optimizer["smoothing"] == plain]
            if row:
                largest = max(c.batch_size for c in info.study.list_cells() if c.optimizer == optimizer)
                here = of_optimizer[of_optimizer["batch_size"] == largest]
            for place, (_, curve) in enumerate(here.groupby(["batch_size", "smoothing"], sort=False)):
                first = curve.iloc[0]
                look = encoding.look(optimizer, int(first["batch_size"]), first["smoothing"])
                # Markers of different curves stand beside each other, however close the curves are.
                panel.plot(curve["a"], _shown(curve["median"]), markevery=(2 + 2 * place, 10), **look)
                panel.fill_between(
                    curve["a"], _shown(curve["low"]), _shown(curve["high"]), color=look["color"], alpha=0.12, lw=0
                )
                lost = curve["a"][curve["lost"] >= 0.5]
                panel.plot(
                    lost, np.full(len(lost), 0.97 - 0.05 * place), "x", color=look["color"], ms=3,
                    transform=panel.get_xaxis_transform(),
                )  # fmt: skip
            if here.empty:
                mark_empty(panel, "no landscape")
            panel.set_ylim(*LOSS_AXIS)
    label_outer(axes, "a", "training loss")
    cross = Line2D([], [], marker="x", ms=3, ls="none", color=INK, label=NOT_FINITE)
    encoding.legend(figure, ["optimizer", "batch size", "smoothing"], [cross] if (points["lost"] >= 0.5).any() else [])
    return figure


def _without(smoothing: str) -> str:
    return "without smoothing" if smoothing == "none" else f"with {smoothing}"


def _of(points: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """The rows that have these values in these columns."""
    for name, value in columns.items():
        points = points[points[name] == value]
    return points


def _clipped() -> str:
    return f"Losses above {LOSS_AXIS[1]:g} are cut off."


def _shown(losses: pd.Series) -> pd.Series:
    """Losses with infinity far beyond the axis, so that a line leaves the panel upwards, and does not end in it."""
    return losses.clip(upper=1e3 * LOSS_AXIS[1])


def _draw_metrics(panel: Axes, points: pd.DataFrame, rightmost: bool) -> None:
    """Losses on the left axis, accuracies on a right one."""
    right = panel.twinx()
    for metric, (colour, line, _) in METRICS.items():
        curve = points[points["metric"] == metric].sort_values("a")
        loss = metric.endswith("loss")
        median, low, high = (
            _shown(curve[name]) if loss else curve[name].where(np.isfinite(curve[name]))
            for name in ("median", "low", "high")
        )
        side = panel if loss else right
        side.plot(curve["a"], median, color=colour, ls=line, lw=1.1)
        side.fill_between(curve["a"], low, high, color=colour, alpha=0.13, lw=0)
        if metric == "train_loss":
            _mark_lost(panel, curve)
    if points.empty:
        mark_empty(panel, "no landscape")
    panel.set_ylim(*LOSS_AXIS)
    panel.tick_params(axis="y", colors=LOSS)
    right.set_ylim(0, 1)
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.tick_params(axis="y", colors=ACCURACY, labelright=rightmost)
    if rightmost:
        right.set_ylabel("accuracy", color=ACCURACY)


def _mark_lost(panel: Axes, curve: pd.DataFrame) -> None:
    """Hatch where at least half of a curve's values are not finite; crosses at the top edge where fewer are not."""
    a, lost = curve["a"].to_numpy(), curve["lost"].to_numpy()
    edges = np.concatenate([a[:1], (a[1:] + a[:-1]) / 2, a[-1:]])
    for left, right, share in zip(edges[:-1], edges[1:], lost, strict=True):
        if share >= 0.5:
            panel.axvspan(left, right, **HATCH)
    some = (lost > 0) & (lost < 0.5)
    panel.plot(a[some], np.full(some.sum(), 0.97), "x", color=INK, ms=3, transform=panel.get_xaxis_transform())


def _not_finite_entry(points: pd.DataFrame) -> list[Any]:
    entries: list[Any] = []
    if (points["lost"] >= 0.5).any():
        entries.append(Patch(label=f"{NOT_FINITE} (half of the curves)", **HATCH))
    if points["lost"].between(0, 0.5, inclusive="neither").any():
        entries.append(Line2D([], [], marker="x", ms=3, ls="none", color=INK, label=f"{NOT_FINITE} (some curves)"))
    return entries


def _legend(figure: Figure, points: pd.DataFrame, extra: list[Any] | None = None) -> None:
    lines = [Line2D([], [], color=colour, ls=line, label=label) for colour, line, label in METRICS.values()]
    handles = [*lines, *(extra or []), *_not_finite_entry(points)]
    per_row = max(2, int(figure.get_figwidth() / 1.9))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), per_row))
