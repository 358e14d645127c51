"""What the minima look like in numbers, next to what they are worth: sharpness and test accuracy of every cell.

Large positive eigenvalues of the Hessian mean a SHARP minimum, and so do large values of Keskar's and SAM's measures
and of the mean rise; a large width means a FLAT one (Keskar et al. 2017). The HPML 2019 slides have the two words
swapped. The definitions: `sharpness`, `hessian`, `curves`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.minima import curves
from lbstudy.analysis.minima.results import list_incomplete
from lbstudy.analysis.rules import CHANGES
from lbstudy.analysis.tables.best import short_names, winners
from lbstudy.study.spec import StudySpec

WHICH_SIDE = (
    "Large positive eigenvalues, like large Keskar and SAM values and a large mean rise, mean a SHARP minimum; a large "
    "width means a FLAT one. (The HPML 2019 slides have the two words swapped.) A network that has hardly learnt lies "
    "flat too: see its training loss."
)

FEW_PAIRS = 8
"""From so many cells on a rank correlation's interval keeps its coverage; see `stats.rank_interval`."""

KEY = {"cell": object, "number": int}
"""What tells runs apart, and its types, which an empty frame does not have by itself."""

WIDTH_RISES = (0.1, 1.0)
RADIUS = 0.5


class Measure(NamedTuple):
    """A measure of sharpness."""

    label: str
    large_is: str  # sharp or flat


MEASURES = {
    "eigenvalue_1": Measure("top Hessian eigenvalue", "sharp"),
    "trace": Measure("Hessian trace", "sharp"),
    "keskar_full_0.001": Measure("Keskar, ε = 1e-3, %", "sharp"),
    "keskar_full_0.0005": Measure("Keskar, ε = 5e-4, %", "sharp"),
    "keskar_subspace_0.001": Measure("Keskar, ε = 1e-3, subspaces, %", "sharp"),
    "keskar_subspace_0.0005": Measure("Keskar, ε = 5e-4, subspaces, %", "sharp"),
    "sam_average": Measure("average rise", "sharp"),
    "sam_average_adaptive": Measure("average rise, adaptive", "sharp"),
    "sam_ascent": Measure("worst rise (SAM)", "sharp"),
    "sam_ascent_adaptive": Measure("worst rise, adaptive (ASAM)", "sharp"),
    "width_0.1": Measure("width of the valley at +0.1", "flat"),
    "width_1": Measure("width of the valley at +1", "flat"),
    "mean_rise": Measure("mean rise within ±0.5", "sharp"),
}
"""Column -> what it is. Values in subspaces are means over draws (`sharpness.measure`); the worst rises are by ascent,
means over mini-batches (`sharpness.worst_rise`)."""

CHIEF = ["eigenvalue_1", "trace", "keskar_full_0.001", "sam_ascent_adaptive", "width_0.1", "mean_rise"]
"""One measure of each sort: what the scatter and a terminal show."""

OUTCOMES = ("test_accuracy", "clean_train_loss")
"""What the minima are worth, and whether they are minima at all."""

LINE_MEASURES = ["width_0.1", "width_1", "mean_rise"]
"""Those that come from the line landscapes; the others come from `lbstudy sharpness`."""

ERRORS = ("eigenvalue_1", "trace", "keskar_subspace_0.001", "keskar_subspace_0.0005")
"""Measures with an error of their own in the table, besides the spread over seeds."""


def line_measures(lines: pd.DataFrame) -> pd.DataFrame:
    """Widths and mean rise of the training loss around each run, medians over its complete directions.

    Columns: cell, number, `width_0.1`, `width_1`, `mean_rise`, and `beyond`, the share of directions whose valley at +1
    goes on beyond the curve, so that its width is a lower bound. A mean rise is infinite where most directions meet a
    loss that is not finite; NaN where the curve does not reach to 0.5 on either side.

    Args:
        lines: as from `results.landscape` with kind line.
    """
    rows = []
    for (cell, number), run in lines.groupby(["cell", "number"], sort=False):
        points = run.groupby("direction")["a"].nunique()
        complete = run[run["direction"].isin(points.index[points == points.max()])]
        by_direction = complete.pivot(index="direction", columns="a", values="train_loss")
        a, losses = by_direction.columns.to_numpy(float), by_direction.to_numpy(float)
        if not a[0] <= 0 <= a[-1]:
            continue
        row: dict[str, Any] = {"cell": cell, "number": number}
        for rise in WIDTH_RISES:
            widths = curves.width(a, losses, rise)
            row[f"width_{rise:g}"] = curves.spread(widths.values).median
            row["beyond"] = float(widths.censored.mean())
        row["mean_rise"] = (
            curves.spread(curves.mean_rise(a, losses)).median if a[0] <= -0.5 and a[-1] >= 0.5 else np.nan
        )
        rows.append(row)
    return pd.DataFrame(rows, columns=["cell", "number", "width_0.1", "width_1", "mean_rise", "beyond"])


def runs(confirmed: pd.DataFrame, sharpness: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """A row per completed confirmed run of what is now its cell's best configuration: cell, optimizer, batch_size,
    smoothing, number, repeat, the OUTCOMES, all MEASURES and the ERRORS' errors; NaN where not measured.

    Args:
        confirmed: as from `load.confirmed`.
        sharpness: as from `results.sharpness`.
        lines: as from `results.landscape` with kind line.
    """
    best = winners(confirmed)
    key = ["cell", "optimizer", "batch_size", "smoothing", "number", "repeat", *OUTCOMES]
    found = best.loc[best["status"] == "completed", key].astype(KEY)
    names = [*MEASURES, *(f"{name}_error" for name in ERRORS)]
    measured = [name for name in names if name in sharpness]
    for measures in (sharpness[["cell", "number", *measured]], line_measures(lines)):
        found = found.merge(measures.astype(KEY), on=["cell", "number"], how="left")
    missing = dict.fromkeys([name for name in names if name not in found], np.nan)
    return found.assign(**missing).astype(dict.fromkeys([*OUTCOMES, *names, "beyond"], float))


def minima_table(study: StudySpec, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: mean and standard deviation (`NAME_sd`) over seeds of the outcomes and of each measure.

    `n` counts the seeds that were measured. `NAME_error` is the largest error of a run: of the eigenvalue the residual
    of Lanczos, of the trace the standard error over probes, of Keskar's measure in subspaces that over draws. `note`
    says what is missing, and where `width_1` is a lower bound because half of a run's valleys or more go on beyond the
    line. Measures that no run has are left out.

    Args:
        study: the study.
        runs: as from `runs`.
    """
    known = [name for name in MEASURES if runs[name].notna().any()]
    rows = []
    for cell in study.list_cells():
        of_cell = runs[runs["cell"] == cell.name]
        measured = of_cell[of_cell[list(MEASURES)].notna().any(axis=1)]
        row: dict[str, Any] = {
            **cell.values,
            "n": len(measured),
        }  # fmt: skip
        for name in (*OUTCOMES, *known):
            values = of_cell[name].dropna()
            row |= {name: values.mean(), f"{name}_sd": _sd(values)}
            if name in ERRORS:
                row[f"{name}_error"] = measured[f"{name}_error"].max()
        row["note"] = _note(of_cell, known)
        rows.append(row)
    return pd.DataFrame(rows)


def for_terminal(table: pd.DataFrame) -> pd.DataFrame:
    """The table of minima, narrow enough for a terminal: the chief measures, without their errors."""
    shown = [name for name in (*OUTCOMES, *CHIEF) if name in table]
    pairs = [column for name in shown for column in (name, f"{name}_sd")]
    names = list(table)[: list(table).index("n") + 1]
    return table[[*names, *pairs, "note"]]


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """A row per measure: Spearman's rank correlation of its cell means with test accuracy, across cells; of each
    combination of further factors for itself.

    `sharper_is` says what it means: "worse" where cells with sharper minima test worse, "better" where they test
    better, and nothing where the interval holds zero. The cells differ in more than sharpness, so it is no cause.

    Args:
        table: as from `minima_table`.
    """
    keys = list(short_names(table))
    groups: Any = table.groupby(keys, sort=False) if keys else [((), table)]
    rows = [dict(zip(keys, values, strict=True)) | row for values, part in groups for row in _correlations(part)]
    return pd.DataFrame(rows, columns=[*keys, *CORRELATION])


CORRELATION = [
    "measure", "large_is", "n", "correlation", "correlation_low", "correlation_high", "p", "sharper_is", "note",
]  # fmt: skip
"""Columns of the table of correlations, after those of the further factors."""


def _correlations(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for name in (name for name in MEASURES if name in table):
        measure = MEASURES[name]
        found = stats.rank_correlation(table[name], table["test_accuracy"])
        sign = 1 if measure.large_is == "sharp" else -1
        told = found.low * found.high > 0  # False where there is no interval
        note = "" if found.n >= FEW_PAIRS else f"{found.n} cells; the interval holds from about eight pairs on"
        values = (
            measure.label, measure.large_is, found.n, found.value, found.low, found.high, found.p,
            ("better" if sign * found.value > 0 else "worse") if told else "", note,
        )  # fmt: skip
        rows.append(dict(zip(CORRELATION, values, strict=True)))
    return rows


def list_left_out(runs: pd.DataFrame, sharpness: pd.DataFrame, lines: pd.DataFrame) -> list[str]:
    """A sentence for each kind of measurement that is missing, of all runs or of some, or files of which are of no use.

    Args:
        runs: as from `runs`.
        sharpness: as from `results.sharpness`.
        lines: as from `results.landscape` with kind line.
    """
    sentences = []
    for name, frame, command in (
        ("sharpness", sharpness, "lbstudy sharpness STUDY"),
        ("widths and mean rise", lines, "lbstudy landscape STUDY --kind line"),
    ):
        if outdated := frame.attrs.get("outdated", []):
            sentences.append(
                f"left out, made by an older rule: {name} in {len(outdated)} files, {outdated[0]} the first "
                f"({CHANGES['sharpness']}); remove the study's folder `sharpness` and run `{command}` to measure again"
            )
        elif frame.empty:
            sentences.append(f"missing: {name}; run `{command}`")
        else:
            measured = frame.set_index(["cell", "number"]).index
            lacking = runs.loc[~runs.set_index(["cell", "number"]).index.isin(measured), "cell"]
            if not lacking.empty:
                cells = "in every cell" if lacking.nunique() == runs["cell"].nunique() else ", ".join(lacking.unique())
                sentences.append(f"missing: {name} of {len(lacking)} of {len(runs)} runs ({cells}); run `{command}`")
        if frame is lines and (cut := list_incomplete(lines, "line")):
            runs_cut = ", ".join(f"{run.cell}/{run.number:04d}" for run in cut)
            sentences.append(f"missing: points of the lines of {runs_cut}; run `{command}`")
        if left_out := frame.attrs.get("left_out", []):
            sentences.append(f"left out, damaged or of no known run: {', '.join(left_out)}; run `{command}`")
    return sentences


def _sd(values: pd.Series) -> float:
    """Standard deviation; NaN for one value, or beside an infinite one."""
    return float(values.std(ddof=1)) if np.isfinite(values).all() else np.nan


def _note(of_cell: pd.DataFrame, known: list[str]) -> str:
    if of_cell.empty:
        return "no confirmed run"
    if of_cell[list(MEASURES)].isna().all(axis=None):
        return "not measured"
    parts = {
        "lines": [name for name in known if name in LINE_MEASURES],
        "sharpness": [name for name in known if name not in LINE_MEASURES],
    }
    counts = {part: int(of_cell[names].notna().any(axis=1).sum()) for part, names in parts.items() if names}
    notes = [f"{part}: {n} of {len(of_cell)} seeds" for part, n in counts.items() if n < len(of_cell)]
    if (of_cell["beyond"] >= 0.5).any():
        notes.append("width_1 is a lower bound")
    return "; ".join(notes)
