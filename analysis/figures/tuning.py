"""Figures of the tuning: sensitivity to each parameter, the best learning rates, and what k trials would have found.

Each is two functions: `*_info` computes what is shown, `draw_*` draws it. The tuning curves are Dodge et al.'s (2019)
expected best score after k trials, with the simultaneous bands of Lourie et al. (2023) from `opda`.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
from lbstudy.records.trial import FINISHED
from lbstudy.study.spec import StudySpec

CONFIDENCE = 0.8
"""Of the bands around the tuning curves: what Lourie et al. show, for the few trials that people can afford."""

SIMULATED = 300
"""Trials up to which the bands are those of Lourie et al., whose simulation takes a time that grows with the square of
their number, here 10 s; beyond, those of Dvoretzky, Kiefer, Wolfowitz and Massart, which are wider and cost nothing."""

POINTS = 300
"""Of a curve, at most."""

NEVER_BELOW, NEVER_ABOVE = 0.0, 1.0
"""Accuracies lie between these; the bands use it."""

DIVERGED_AT = 0.05
"""Height of the diverged trials in a panel, as a fraction of it."""


class Sensitivity(NamedTuple):
    """How validation accuracy, or the time to the study's target, depends on one tuned parameter."""

    study: StudySpec
    parameter: str
    trials: pd.DataFrame
    """A row per trial: cell, optimizer, batch_size, smoothing, number, status (missed: completed without reaching the
    target), value, val_accuracy (NaN where it diverged) or the time (NaN where the target was not reached), and best
    (bool)."""
    log: bool
    bounds: tuple[float, float]  # the ends of the widest range, and what lies beyond


def sensitivity_info(study: StudySpec, trials: pd.DataFrame, parameter: str) -> Sensitivity:
    """Collect the trials of all cells that tune `parameter`.

    Args:
        study: the study.
        trials: as from `load.trials`.
        parameter: one of `study.tuned()`.

    Raises:
        NothingToDraw: no trial has ended.
    """
    column = f"params.{parameter}"
    ended = trials[trials["status"].isin(["completed", "pruned", "diverged"])]
    if column not in ended or ended[column].isna().all():
        raise NothingToDraw(f"no trial with a value of {parameter} has ended")
    shown = ended[ended[column].notna()]
    best = best_trials(study, trials)
    found = shown[["cell", "optimizer", "batch_size", "smoothing", "number", "status"]].assign(
        value=shown[column].astype(float), best=shown.index.isin(best.index)
    )
    score = _score(study)
    if study.tuning.goal:
        reached = (shown["status"] == "completed") & np.isfinite(shown[score])
        found["status"] = shown["status"].mask(shown["status"].eq("completed") & ~reached, "missed")
        found[score] = shown[score].where(reached)
    else:
        found[score] = shown[score].where(shown["status"] != "diverged")
    ranges = [study.ranges(cell)[parameter] for cell in study.list_cells() if parameter in study.ranges(cell)]
    ends = [end for entry in ranges for end in entry.bounds]
    log = any(entry.log_uniform for entry in ranges) and found["value"].min() > 0
    bounds = (min(*ends, found["value"].min()), max(*ends, found["value"].max()))
    return Sensitivity(study, parameter, found.reset_index(drop=True), log, bounds)


def _score(study: StudySpec) -> str:
    """What trials are shown by."""
    return study.tuning.metric if study.tuning.goal else "val_accuracy"


@in_style
def draw_sensitivity(info: Sensitivity) -> Figure:
    """A panel per cell: a point per trial; filled if completed, hollow if pruned, a cross at the bottom if diverged. Of
    times to a target those that are not known lie at the top."""
    cells = [cell for cell in info.study.list_cells() if info.parameter in info.study.ranges(cell)]
    encoding = Encoding.of(info.study).only(cells)
    columns = encoding.smoothings
    rows = [
        (o, b) for o in encoding.optimizers for b in encoding.batch_sizes
        if any((cell.optimizer, cell.batch_size) == (o, b) for cell in cells)
    ]  # fmt: skip
    name = info.parameter.replace("_", " ")
    counts = info.trials.groupby("cell").size()
    score, goal = _score(info.study), info.study.tuning.goal
    what = f"{_unit(info.study)} to {goal}" if goal else "validation accuracy"
    lost = "At the top: not reached" if goal else "Pruned: its last accuracy. Diverged: at the bottom"
    figure, axes = panels(
        info.study.name, f"{what} against {name}",
        f"A point is a trial, {_span(counts, 'trial')} a cell. {lost}.",
        [f"{o}\nbatch {b}" for o, b in rows], columns, height=1.15,
    )  # fmt: skip
    scores = info.trials[score]
    low, high = (0.0, 1.0) if scores.isna().all() else (scores.min(), scores.max())
    room = max(high - low, 0.02)
    for row, (optimizer, batch_size) in enumerate(rows):
        for column, smoothing in enumerate(columns):
            panel, trials = axes[row, column], info.trials
            here = trials[
                (trials["optimizer"] == optimizer)
                & (trials["batch_size"] == batch_size)
                & (trials["smoothing"] == smoothing)
            ]
            look = encoding.look(optimizer, smoothing=smoothing) | {"linestyle": "none"}
            for status, hollow in (("completed", False), ("pruned", True)):
                part = here[here["status"] == status]
                panel.plot(part["value"], part[score], **look, **({"fillstyle": "none"} if hollow else {}))
            for status, marker in (
                (("missed", None), ("pruned", None), ("diverged", "x")) if goal else (("diverged", "x"),)
            ):
                lost_ones = here.loc[(here["status"] == status) & here[score].isna(), "value"]
                panel.plot(
                    lost_ones, np.full(len(lost_ones), 1 - DIVERGED_AT if goal else DIVERGED_AT),
                    transform=panel.get_xaxis_transform(),
                    **look | ({"marker": marker} if marker else {"fillstyle": "none"}),
                )  # fmt: skip
            if here["best"].any():  # a line without points that is not clipped would upset the layout
                best = here[here["best"]]
                panel.plot(best["value"], best[score], "o", ms=9, mfc="none", mec=INK, mew=0.9, clip_on=False)
            if goal:
                factor = max(high / low, 1.5) if low > 0 else 1.5
                panel.set_ylim(low / factor**0.1 if low > 0 else 0.5, high * factor**0.3)
                log_axis(panel, "y")
            else:
                panel.axhline(low - 0.08 * room, color=INK, lw=0.5, alpha=0.4)
                panel.set_ylim(low - 0.22 * room, high + 0.1 * room)
            if here.empty:
                mark_empty(panel, "no trial has ended")
    low_end, high_end = info.bounds
    margin = (high_end / low_end) ** 0.04 if info.log else 0.04 * (high_end - low_end)
    limits = (low_end / margin, high_end * margin) if info.log else (low_end - margin, high_end + margin)
    for panel in axes.flat:
        panel.set_xlim(limits)
        if info.log:
            log_axis(panel, "x")
    label_outer(axes, name, _unit(info.study) if goal else "accuracy")
    plain: dict[str, Any] = {"ls": "none", "color": INK}
    states = [
        Line2D([], [], marker="o", label="reached" if goal else "completed", **plain),
        Line2D([], [], marker="o", fillstyle="none", label="missed or pruned" if goal else "pruned", **plain),
        Line2D([], [], marker="x", label="diverged", **plain),
        Line2D([], [], marker="o", ms=9, mfc="none", mew=0.9, label="best of its cell", **plain),
    ]
    encoding.legend(figure, ["optimizer"], states)
    return figure


class BestRates(NamedTuple):
    """The best learning rate of each cell, against batch size."""

    study: StudySpec
    trials: pd.Series  # trials that have ended, by cell
    cells: pd.DataFrame
    """A row per cell, by batch size: optimizer, batch_size, smoothing, best, low and high (the range that was
    searched), linear and sqrt (what these rules make of the best rate of the smallest batch; NaN without it)."""


def best_rates_info(study: StudySpec, trials: pd.DataFrame) -> BestRates:
    """Find each cell's best learning rate, and what the scaling rules predict from that of the smallest batch.

    Linear: eta = eta_0 B / B_0 (Goyal et al. 2017). Square root: eta = eta_0 sqrt(B / B_0) (Krizhevsky 2014).

    Raises:
        NothingToDraw: one batch size, or no cell has a best trial with a tuned learning rate.
    """
    encoding = Encoding.of(study)
    if len(encoding.batch_sizes) < 2:
        raise NothingToDraw(f"all cells have batch size {encoding.batch_sizes[0]}")
    best = best_trials(study, trials).set_index("cell")
    if best.empty:
        raise NothingToDraw("no trial has completed")
    rates = best["params.learning_rate"] if "params.learning_rate" in best else pd.Series(dtype=float)
    rows = []
    for cell in sorted(study.list_cells(), key=lambda cell: cell.batch_size):
        if "learning_rate" not in study.ranges(cell):
            continue
        low, high = study.ranges(cell)["learning_rate"].bounds
        found = float(rates.get(cell.name, np.nan))
        rows.append((cell.optimizer, cell.batch_size, cell.smoothing, found, low, high))
    if not rows:
        raise NothingToDraw("no cell tunes the learning rate")
    cells = pd.DataFrame(rows, columns=["optimizer", "batch_size", "smoothing", "best", "low", "high"])
    smallest = cells[cells["batch_size"] == encoding.batch_sizes[0]].set_index(["optimizer", "smoothing"])["best"]
    keys = pd.MultiIndex.from_frame(cells[["optimizer", "smoothing"]])
    first = smallest.reindex(keys).to_numpy()
    ratio = cells["batch_size"] / encoding.batch_sizes[0]
    ended = trials[trials["status"].isin(FINISHED)].groupby("cell").size()
    return BestRates(study, ended, cells.assign(linear=first * ratio, sqrt=first * np.sqrt(ratio)))


@in_style
def draw_best_rates(info: BestRates) -> Figure:
    """A panel per optimizer and smoothing, with both rules as guides through the smallest batch."""
    encoding = Encoding.of(info.study)
    optimizers = [o for o in encoding.optimizers if o in set(info.cells["optimizer"])]
    figure, axes = panels(
        info.study.name, "best learning rate against batch size",
        f"The best of {_span(info.trials, 'trial')} a cell, one seed each. Bars: the range searched.",
        optimizers, encoding.smoothings,
    )  # fmt: skip
    for row, optimizer in enumerate(optimizers):
        for column, smoothing in enumerate(encoding.smoothings):
            panel = axes[row, column]
            here = info.cells[(info.cells["optimizer"] == optimizer) & (info.cells["smoothing"] == smoothing)]
            panel.vlines(here["batch_size"], here["low"], here["high"], color=INK, alpha=0.12, lw=6)
            panel.plot(here["batch_size"], here["linear"], "--", color=INK, lw=0.8)
            panel.plot(here["batch_size"], here["sqrt"], ":", color=INK, lw=1)
            panel.plot(here["batch_size"], here["best"], **encoding.look(optimizer, smoothing=smoothing))
            if here["best"].isna().all():
                mark_empty(panel, "not in the study" if here.empty else "no trial has completed")
    low, high = info.cells["low"].min(), max(info.cells["high"].max(), info.cells["best"].max())
    for panel in axes.flat:
        batch_size_axis(panel, encoding.batch_sizes)
        panel.set_ylim(low / 1.5, high * 1.5)
        log_axis(panel, "y")
    label_outer(axes, "batch size", "learning rate")
    guides = [
        Line2D([], [], ls="--", lw=0.8, color=INK, label="linear rule"),
        Line2D([], [], ls=":", lw=1, color=INK, label="square-root rule"),
    ]
    encoding.legend(figure, ["optimizer", "smoothing"], guides)
    return figure


class TuningCurves(NamedTuple):
    """Expected best validation accuracy, or time to the study's target, after k trials, of each cell."""

    study: StudySpec
    points: pd.DataFrame
    """A row per cell and k: cell, optimizer, batch_size, smoothing, k, expected, low and high (the band; NaN where
    `guaranteed` does not hold)."""
    guaranteed: bool
    """The trials of every cell are independent draws that had the full budget, so the bands hold."""
    basis: str
    """What the curves rest on, in a sentence."""


def tuning_curves_info(study: StudySpec, trials: pd.DataFrame) -> TuningCurves:
    """Estimate the expected best accuracy of k trials drawn as these were, for k up to their number.

    Published configurations are no draws of the sampler and do not count. A diverged trial counts with accuracy 0: it
    has used up a trial and found nothing. A pruned one counts with the accuracy that it had; then, and with a sampler
    that learns from trial to trial, the curve describes what happened and no band is given.

    Of a study that was tuned for a target it is the expected least time to it. A trial that has not reached it counts
    with the time of the whole budget, the least that it can have; a cell of which none has is not known.

    Raises:
        NothingToDraw: no trial of the sampler has ended.
    """
    drawn = trials[trials["status"].isin(["completed", "pruned", "diverged"]) & ~trials["published"].astype(bool)]
    if drawn.empty:
        raise NothingToDraw("no trial of the sampler has ended")
    pruned = bool((drawn["status"] == "pruned").any())
    guaranteed = study.tuning.sampler == "random" and not pruned
    parts = []
    for cell, group in drawn.groupby("cell", sort=False):
        ks = _numbers_up_to(len(group))
        low = expected = high = np.full(len(ks), np.nan)
        if not study.tuning.goal:
            accuracies = group["val_accuracy"].where(group["status"] != "diverged", 0.0).fillna(0.0).to_numpy(float)
            scores: tuple[np.ndarray, float] | None = accuracies, NEVER_ABOVE
        elif np.isfinite(group.loc[group["status"] == "completed", study.tuning.metric]).any():
            scores = _times(study, group)
        else:
            scores = None
        if scores is not None:
            expected = _expected_best(*scores, ks, least=bool(study.tuning.goal))
        if scores is not None and guaranteed:
            low, high = _bands(*scores, ks, least=bool(study.tuning.goal))
        first = group.iloc[0]
        part = pd.DataFrame({"k": ks, "expected": expected, "low": low, "high": high})
        part.insert(0, "cell", cell)
        for place, name in enumerate(("optimizer", "batch_size", "smoothing"), start=1):
            part.insert(place, name, first[name])
        parts.append(part)
    points = pd.concat(parts, ignore_index=True)
    if guaranteed:
        basis = (
            f"Independent random trials, none pruned; bands hold for all k at once ({100 * CONFIDENCE:g} % confidence)"
        )
    else:
        sampler = {"tpe": "TPE", "gp": "Gaussian process", "qmc": "Quasi-random", "random": "Random"}
        basis = (
            f"{sampler[study.tuning.sampler]} trials{', some of them pruned' if pruned else ''}: not independent draws "
            "with the full budget; a description, no guarantee"
        )
    return TuningCurves(study, points, guaranteed, basis)


def _times(study: StudySpec, trials: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Times of a cell's trials to the target, and that of the whole budget, which those have that did not reach it."""
    times = trials[study.tuning.metric].astype(float)
    reached = (trials["status"] == "completed") & np.isfinite(times)
    of_pass, batch_size = ceil((trials["step"] / trials["epochs"]).max()), int(trials["batch_size"].iloc[0])
    steps = study.budget.extent(of_pass * batch_size, batch_size).steps
    step = {"steps": 1.0, "epochs": 1 / of_pass, "seconds": float((trials["seconds"] / trials["step"]).median())}
    longest = max(steps * step[_unit(study)], times[reached].max())
    return times.where(reached, longest).to_numpy(float), longest


def _unit(study: StudySpec) -> str:
    """What the time to the study's target is counted in."""
    return study.tuning.metric.partition("_")[0]


def _numbers_up_to(trials: int) -> np.ndarray:
    """Numbers of trials at which a curve is computed: all, or as many as can be told apart in a figure."""
    if trials <= POINTS:
        return np.arange(1, trials + 1)
    return np.unique(np.geomspace(1, trials, POINTS).round().astype(int))


def _expected_best(scores: np.ndarray, never_above: float, ks: np.ndarray, least: bool) -> np.ndarray:
    """E[max of k draws], or of the `least`, at each k."""
    from opda.nonparametric import EmpiricalDistribution  # here, since the import takes most of a second

    distribution = EmpiricalDistribution(scores, a=NEVER_BELOW, b=never_above)
    return np.asarray(distribution.average_tuning_curve(ks, minimize=least))


def _bands(scores: np.ndarray, never_above: float, ks: np.ndarray, least: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper band of `_expected_best`.

    Both rise as the distribution's CDF falls, so the upper band of the CDF gives the lower one of the curve.
    """
    from opda.nonparametric import EmpiricalDistribution

    simulated = len(scores) <= SIMULATED
    with warnings.catch_warnings():
        # Equal accuracies: the bands then cover with at least the stated confidence, and no longer exactly with it.
        warnings.filterwarnings("ignore", "Duplicates detected", RuntimeWarning)
        above, _, below = EmpiricalDistribution.confidence_bands(
            scores, CONFIDENCE, NEVER_BELOW, never_above, method="ld_equal_tailed" if simulated else "dkw",
            generator=_generator(len(scores)), n_jobs=1,
        )  # fmt: skip
    low, high = (distribution.average_tuning_curve(ks, minimize=least) for distribution in (below, above))
    return np.asarray(low), np.asarray(high)


@cache
def _generator(trials: int) -> np.random.Generator:
    """opda simulates its critical values once for each (number of trials, generator) and remembers them."""
    return np.random.default_rng(trials)


@in_style
def draw_tuning_curves(info: TuningCurves) -> Figure:
    """A panel per optimizer and smoothing, a curve per batch size."""
    encoding = Encoding.of(info.study)
    counts = info.points.groupby("cell")["k"].max()
    goal, unit = info.study.tuning.goal, _unit(info.study)
    lost = "diverged trials count with accuracy 0, pruned ones with what they had, published ones not at all"
    if goal:
        lost = "those that did not reach it count with the whole budget, and a cell without any that did has no curve"
    what = f"fewest {unit} to {goal}" if goal else "best validation accuracy"
    figure, axes = panels(
        info.study.name, f"expected {what} after k trials",
        f"{info.basis}. {_span(counts, 'trial')} a cell, one seed each; {lost}.",
        encoding.optimizers, encoding.smoothings,
    )  # fmt: skip
    for row, optimizer in enumerate(encoding.optimizers):
        for column, smoothing in enumerate(encoding.smoothings):
            panel, points = axes[row, column], info.points
            here = points[(points["optimizer"] == optimizer) & (points["smoothing"] == smoothing)]
            for batch_size, curve in here.groupby("batch_size"):
                look = encoding.look(optimizer, int(str(batch_size)), smoothing)
                panel.plot(curve["k"], curve["expected"], **look, markevery=max(1, len(curve) // 6))
                panel.fill_between(curve["k"], curve["low"], curve["high"], color=look["color"], alpha=0.12, lw=0)
                panel.plot(curve["k"], curve[["low", "high"]], lw=0.6, alpha=0.6, **look | {"marker": None})
            if here["expected"].isna().all():
                mark_empty(panel, "no trial has ended" if here.empty else "no trial has reached it")
            panel.xaxis.get_major_locator().set_params(integer=True)
            if goal:
                log_axis(panel, "y")
    label_outer(axes, "trials k", f"{unit} to target" if goal else "accuracy")
    encoding.legend(figure, ["optimizer", "batch size", "smoothing"])
    return figure


def _span(counts: pd.Series, noun: str) -> str:
    """`n = 6 trials`, or `n = 4 to 6 trials`."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low if low == high else f'{low} to {high}'} {noun}{'' if high == 1 else 's'}"
