"""Figures of the runs: learning curves, and steps to a target against batch size.

Each is two functions: `*_info` computes what is shown, `draw_*` draws it. Learning curves are those of the confirmed
runs, several seeds a cell; where there are none, that of the cell's best tuning trial. Steps to a target against batch
size is the figure of Shallue et al. (2019) and Ma et al. (2020): along the ideal-scaling line twice the batch size
takes half the steps. The curve through them, and the critical batch size, are `scaling.fit`'s.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lbstudy.analysis import load, scaling
from lbstudy.analysis.figures.style import (
    INK,
    Encoding,
    NothingToDraw,
    batch_size_axis,
    in_style,
    label_outer,
    log_axis,
    mark_empty,
    panels,
)  # fmt: skip
from lbstudy.analysis.tables.best import best_trials
from lbstudy.study.run import TrainOn
from lbstudy.study.spec import StudySpec

METRICS = {
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "clean_train_loss": "training loss, clean",
    "train_loss": "training loss, as optimised",
}
"""Metric -> label. Training loss as optimised is augmented, mixed and noised, so it compares no smoothings; it is shown
only where no run was confirmed."""

TIMES_FIRST_LOSS = 2
"""Losses above so many times the first epoch's, the median over cells, are cut off: a run that diverges has 1000s."""

CRITICAL_AT = 0.06
"""Height of the first critical batch size in a panel, and of every further one above it."""

CURVES = " Curves: S(B) = S_min (1 + B_crit / B). At the bottom: B_crit with its 95 % interval over seeds."

MISSED_AT = 0.93
"""Height of the misses in a panel, as a fraction of it."""


class LearningCurves(NamedTuple):
    """Metrics against epochs and steps, of every cell."""

    study: StudySpec
    points: pd.DataFrame
    """A row per cell, metric and evaluation: cell, optimizer, batch_size, smoothing, metric, epoch (with a part of one
    where it is within), step, mean, low and high (of the seeds; NaN for one seed), n (seeds), confirmed (bool)."""
    train_on: TrainOn  # what the confirmed runs trained on
    diverged: dict[str, tuple[int, int]]
    """Cell -> how many of its confirmed runs diverged, of how many; only where some did."""
    missing: list[str]
    """Cells without a confirmed run and without a completed trial."""


def learning_curves_info(
    study: StudySpec, trials: pd.DataFrame, epochs: pd.DataFrame, confirmed_epochs: pd.DataFrame,
    train_on: TrainOn = "split",
) -> LearningCurves:  # fmt: skip
    """Average the confirmed runs of each cell's best configuration over their seeds.

    A run that diverged keeps its last accuracy, for that is what its weights score, and has no loss from then on, so
    the cell's mean loss ends there. Runs that ended early for another reason (failed, or not done yet) do not count.

    Args:
        study: the study.
        trials: as from `load.trials`.
        epochs: as from `load.epochs`; used for cells without confirmed runs.
        confirmed_epochs: as from `load.confirmed_epochs`; may be empty.
        train_on: what the confirmed runs trained on. After training on all samples, the validation samples among them
            validate nothing, and the accuracy on them is left out.

    Raises:
        NothingToDraw: no cell has a confirmed run or a completed trial.
    """
    epochs, confirmed_epochs = _evaluations(epochs), _evaluations(confirmed_epochs)
    best = best_trials(study, trials).set_index("cell")["number"]
    no_evidence = ["train_loss", "val_accuracy"] if train_on == "all" else ["train_loss"]
    parts, diverged, missing = [], {}, []
    for cell in study.list_cells():
        short = cell.but(factors=()).name  # the heading has the values of further factors
        runs, confirmed = _of_cell(confirmed_epochs, cell.name), True
        if not runs.empty:
            runs = runs[runs["rank"].eq(0).fillna(False).astype(bool)]
        if runs.empty and cell.name in best.index:
            runs, confirmed = _of_cell(epochs, cell.name), False
            runs = runs[runs["number"] == best[cell.name]].assign(repeat=0)
        if runs.empty:
            missing.append(short)
            continue
        runs, dead = _comparable(runs)
        if dead:
            diverged[short] = (len(dead), runs["repeat"].nunique())
        for metric in METRICS:
            if metric in runs and not (confirmed and metric in no_evidence):
                part = _over_seeds(runs, metric, dead).assign(
                    cell=cell.name, optimizer=cell.optimizer, batch_size=cell.batch_size, smoothing=cell.smoothing,
                    metric=metric, confirmed=confirmed,
                )  # fmt: skip
                parts.append(part)
    points = pd.concat(parts, ignore_index=True).dropna(subset="mean") if parts else pd.DataFrame()
    if points.empty:
        raise NothingToDraw("no run was confirmed and no trial has completed")
    if points["confirmed"].any():
        points = points[points["metric"] != "train_loss"]
    return LearningCurves(study, points.reset_index(drop=True), train_on, diverged, missing)


def _evaluations(epochs: pd.DataFrame) -> pd.DataFrame:
    """Epochs with the evaluations within them, which are at parts of epochs."""
    return load.evaluations(epochs).assign(epoch=lambda found: found["epochs"]) if "within" in epochs else epochs


def _of_cell(epochs: pd.DataFrame, cell: str) -> pd.DataFrame:
    return epochs if epochs.empty else epochs[epochs["cell"] == cell]


def _comparable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """The runs as long as the longest one, and those that diverged; and the repeats of the latter."""
    ends = runs[runs["epoch"] % 1 == 0]  # within epochs not all of them are measured
    losses = ends[[m for m in ("train_loss", "val_loss", "clean_train_loss") if m in ends]].to_numpy(float)
    dead = sorted(ends["repeat"][~np.isfinite(losses).all(axis=1)].unique())
    last = runs.groupby("repeat")["epoch"].transform("max")
    return runs[(last == last.max()) | runs["repeat"].isin(dead)], dead


def _over_seeds(runs: pd.DataFrame, metric: str, dead: list[int]) -> pd.DataFrame:
    """Mean, lowest and highest of a metric at each epoch."""
    by_seed = runs.pivot(index="epoch", columns="repeat", values=metric).astype(float)
    if metric.endswith("accuracy"):
        by_seed[dead] = by_seed[dead].ffill()
    seeds = by_seed.shape[1]
    spread = pd.DataFrame({"mean": by_seed.mean(axis=1, skipna=False), "low": np.nan, "high": np.nan, "n": seeds})
    if seeds > 1:
        spread = spread.assign(low=by_seed.min(axis=1), high=by_seed.max(axis=1))
    return spread.assign(step=runs.groupby("epoch")["step"].max()).reset_index()


@in_style
def draw_learning_curves(info: LearningCurves, against: Literal["epoch", "step"] = "epoch") -> Figure:
    """A row per metric, a column per smoothing. Cells that were not confirmed are pale."""
    encoding, points = Encoding.of(info.study), info.points
    metrics = [metric for metric in METRICS if (points["metric"] == metric).any()]
    figure, axes = panels(
        info.study.name, f"learning curves against {against}s", _learning_curves_note(info),
        [""] * len(metrics), encoding.smoothings, sharey="row",
    )  # fmt: skip
    any_confirmed = points["confirmed"].any()
    for row, metric in enumerate(metrics):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            here = points[(points["metric"] == metric) & (points["smoothing"] == smoothing)]
            for _, curve in here.groupby("cell", sort=False):
                first = curve.iloc[0]
                look = encoding.look(first["optimizer"], int(first["batch_size"]), smoothing)
                pale = any_confirmed and not first["confirmed"]
                panel.plot(
                    curve[against], curve["mean"], markevery=(len(curve) // 6, max(1, len(curve) // 3)),
                    alpha=0.4 if pale else 1, **look,
                )  # fmt: skip
                panel.fill_between(curve[against], curve["low"], curve["high"], color=look["color"], alpha=0.2, lw=0)
            if here.empty:
                mark_empty(panel, "nothing confirmed" if any_confirmed else "no trial has completed")
        if metric.endswith("loss"):
            if np.isfinite(highest := _cut_off(points, metric)):
                losses = points.loc[points["metric"] == metric, ["mean", "low"]].to_numpy(float)
                axes[row, 0].set_ylim(0.9 * np.nanmin(losses), highest)
            log_axis(axes[row, 0], "y")
    for panel in axes.flat:
        if against == "step":
            log_axis(panel, "x")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
    label_outer(axes, f"{against}s", [METRICS[metric] for metric in metrics])
    encoding.legend(figure, ["optimizer", "batch size", "smoothing"])
    return figure


def _cut_off(points: pd.DataFrame, metric: str) -> float:
    """The highest loss that is shown; infinite where that is all."""
    curves = points[points["metric"] == metric]
    highest = TIMES_FIRST_LOSS * float(curves.loc[curves["epoch"] == curves["epoch"].min(), "mean"].median())
    return highest if np.nanmax(curves[["mean", "high"]].to_numpy(float)) > highest else np.inf


def _learning_curves_note(info: LearningCurves) -> str:
    """What the lines and bands are, and what is missing."""
    confirmed = info.points[info.points["confirmed"]]
    sentences = []
    if confirmed.empty:
        sentences.append("No run was confirmed: the best tuning trial of each cell, n = 1 seed.")
    else:
        low, high = confirmed["n"].min(), confirmed["n"].max()
        seeds = f"{low}" if low == high else f"{low} to {high}"
        band = "; band: lowest to highest seed" if high > 1 else ""
        where = "all training samples" if info.train_on == "all" else "the tuning split"
        sentences.append(f"Confirmed runs on {where}, mean of n = {seeds} seed{'' if high == 1 else 's'}{band}.")
        if not info.points["confirmed"].all():
            sentences.append("Pale: not confirmed, the best tuning trial of the cell, n = 1.")
    if info.diverged:
        listed = ", ".join(f"{cell} {count} of {of}" for cell, (count, of) in info.diverged.items())
        sentences.append(f"Diverged: {listed}; the mean loss ends there.")
    losses = [metric for metric in info.points["metric"].unique() if metric.endswith("loss")]
    if np.isfinite(highest := min((_cut_off(info.points, metric) for metric in losses), default=np.inf)):
        sentences.append(f"Losses above {highest:.2g} are cut off.")
    if info.missing:
        sentences.append(f"No completed run: {', '.join(info.missing)}.")
    return " ".join(sentences)


class StepsToTarget(NamedTuple):
    """Steps to a target against batch size."""

    study: StudySpec
    target: str  # in words: what was to be reached
    cells: pd.DataFrame
    """A row per cell, by batch size: optimizer, batch_size, smoothing, median, low and high (of the runs; infinite
    where missed), missed (how many runs), n (runs), ideal (steps of the smallest batch that reached the target, scaled
    by 1/batch size; NaN without one)."""
    fits: dict[tuple[str, str], scaling.Fit]
    """Optimizer and smoothing -> S(B) = S_min (1 + B_crit / B), of those that have such a curve; of steps only."""


def steps_to_target_info(
    study: StudySpec, reached: pd.DataFrame, target: str, unit: Literal["steps", "epochs", "seconds"] = "steps"
) -> StepsToTarget:
    """Summarise each cell's runs: a miss is infinitely late, so a cell that mostly misses has an infinite median.

    Args:
        study: the study.
        reached: a row per run: optimizer, batch_size, smoothing, repeat, and steps, epochs, seconds (infinite: missed),
            steps_low (`targets.times_to_target`).
        target: in words, such as "validation accuracy 0.95".
        unit: which column to take; with epochs the ideal line is level, and seconds have none.

    Raises:
        NothingToDraw: no runs, or none that reached the target.
    """
    if reached.empty or not np.isfinite(reached[unit].astype(float)).any():
        raise NothingToDraw(f"no run has reached {target}" if len(reached) else "no runs to look for a target in")
    rows = []
    for (optimizer, batch_size, smoothing), group in reached.groupby(["optimizer", "batch_size", "smoothing"]):
        values = np.sort(group[unit].to_numpy(float))
        middle = values[[(len(values) - 1) // 2, len(values) // 2]].mean()  # np.median makes NaN of two infinities
        missed = int(np.isinf(values).sum())
        rows.append((optimizer, batch_size, smoothing, middle, values[0], values[-1], missed, len(values)))
    names = ["optimizer", "batch_size", "smoothing", "median", "low", "high", "missed", "n"]
    cells = pd.DataFrame(rows, columns=names).sort_values("batch_size", ignore_index=True)
    hit = cells[np.isfinite(cells["median"])].groupby(["optimizer", "smoothing"])[["median", "batch_size"]].first()
    first = hit.reindex(pd.MultiIndex.from_frame(cells[["optimizer", "smoothing"]])).reset_index(drop=True)
    exponent = {"steps": 1.0, "epochs": 0.0, "seconds": np.nan}[unit]
    ideal = first["median"] * (first["batch_size"] / cells["batch_size"]) ** exponent
    cells = cells.assign(ideal=ideal.where(cells["batch_size"] >= first["batch_size"]))
    fits = {
        (str(optimizer), str(smoothing)): fit
        for (optimizer, smoothing), group in (reached.groupby(["optimizer", "smoothing"]) if unit == "steps" else ())
        if (fit := scaling.fit(scaling.Runs.of(group))).curve
    }
    return StepsToTarget(study, target, cells, fits)


@in_style
def draw_steps_to_target(info: StepsToTarget, unit: Literal["steps", "epochs", "seconds"] = "steps") -> Figure:
    """A panel per smoothing; cells that missed the target are hollow and lie at the top edge, and critical batch sizes
    at the bottom."""
    encoding = Encoding.of(info.study)
    runs = info.cells["n"]
    n = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
    bars = ", bars: fastest to slowest" if runs.max() > 1 else ""
    figure, axes = panels(
        info.study.name, f"{unit} to {info.target} against batch size",
        f"Median of n = {n} run{'' if runs.max() == 1 else 's'} a cell{bars}. "
        f"Hollow, at the top edge: missed by half of the runs or more.{CURVES if info.fits else ''}",
        [""], encoding.smoothings, height=2.1,
    )  # fmt: skip
    finite = info.cells[["low", "high", "ideal"]].to_numpy(float)
    finite = finite[np.isfinite(finite)]
    low, top = finite.min(), finite.max()
    room = max(top / low, 2.0)
    for panel, smoothing in zip(axes[0], encoding.smoothings, strict=True):
        panel.set_ylim(low / room ** (0.08 + (0.3 if info.fits else 0)), top * room**0.25)
        for place, optimizer in enumerate(encoding.optimizers):
            cells = info.cells
            here = cells[(cells["optimizer"] == optimizer) & (cells["smoothing"] == smoothing)]
            look = encoding.look(optimizer, smoothing=smoothing)
            panel.plot(here["batch_size"], here["ideal"], ls=":", lw=1, color=look["color"])
            beside = here["batch_size"] * 1.1 ** (place - (len(encoding.optimizers) - 1) / 2)
            hit = np.isfinite(here["median"])
            fit = info.fits.get((optimizer, smoothing))
            line = {"linestyle": "none"} if fit else {}  # without a curve, a line that breaks at a miss
            panel.plot(beside, here["median"].where(hit), **look | line)
            highest = here["high"].where(np.isfinite(here["high"]), top * room)  # beyond the edge
            panel.vlines(beside[hit], here["low"][hit], highest[hit], color=look["color"], lw=0.8)
            panel.plot(
                beside[~hit], np.full((~hit).sum(), MISSED_AT), transform=panel.get_xaxis_transform(),
                **look | {"linestyle": "none", "fillstyle": "none"},
            )  # fmt: skip
        if not (info.cells["smoothing"] == smoothing).any():
            mark_empty(panel, "no runs")
        batch_size_axis(panel, encoding.batch_sizes)
        log_axis(panel, "y")
        for place, optimizer in enumerate(encoding.optimizers):
            if fit := info.fits.get((optimizer, smoothing)):
                _draw_fit(panel, fit, encoding.look(optimizer)["color"], CRITICAL_AT * (place + 1))
    label_outer(axes, "batch size", f"{unit} to target")
    extra = [Line2D([], [], marker="o", fillstyle="none", ls="none", color=INK, label="missed")]
    if info.cells["ideal"].notna().any():
        extra.append(Line2D([], [], ls=":", lw=1, color=INK, label="ideal scaling"))
    if info.fits:
        extra.append(Line2D([], [], marker="|", ms=7, mew=1.4, lw=1.2, color=INK, label="critical batch size"))
    encoding.legend(figure, ["optimizer", "smoothing"], extra)
    return figure


def _draw_fit(panel: Axes, fit: scaling.Fit, colour: str, height: float) -> None:
    """The curve through the steps and, at a height of the panel (as a fraction), the critical batch size with its
    interval: a tick on a bar, an arrow at the edge that it lies beyond."""
    assert fit.curve is not None
    sizes = np.geomspace(fit.curve.small, fit.curve.large, 100)
    panel.plot(sizes, fit.curve.steps(sizes), color=colour, lw=1.2)
    left, right = panel.get_xlim()
    value, low, high = fit.critical
    mark: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "color": colour}
    if not np.isnan(low):
        panel.plot(np.clip([low, high], left, right), [height] * 2, lw=1.2, **mark)
    beyond = "<" if value < left else ">" if value > right else "|"
    edge = value if beyond == "|" else left * 1.08 if beyond == "<" else right / 1.08
    panel.plot(edge, height, marker=beyond, ms=7 if beyond == "|" else 4, mew=1.4, ls="none", **mark)
