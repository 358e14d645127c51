"""The gradient noise scale of each cell at its solutions: B_simple = tr(Sigma) / |G|^2, see `minima.noise`.

A mini-batch much smaller than that is mostly noise, and one much larger mostly signal. The simple scale rises as the
gradient falls, so that it says more of a run's course than of its end (the figure has the course).
"""

from __future__ import annotations

from math import nan
from typing import Any

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.tables.best import winners, with_factors
from lbstudy.study.spec import StudySpec

COLUMNS: dict[str, Any] = {
    "optimizer": object, "batch_size": "Int64", "smoothing": object, "gradient": object, "n": "Int64",
    "noise_scale": float, "noise_scale_low": float, "noise_scale_high": float, "noise_scale_error": float,
    "trace": float, "squared_norm": float, "falls_as": float, "note": object,
}  # fmt: skip


def noise_table(study: StudySpec, measured: pd.DataFrame) -> pd.DataFrame:
    """A row per cell, and one more for the `gradient` with its smoothing in force where it has one.

    `noise_scale` is the mean trace over the mean squared norm of the gradient at the `n` seeds' solutions, with
    Fieller's 95 % interval over seeds; `noise_scale_error` is the mean standard error of single models, over
    mini-batches. All are from the smallest mini-batches, of which there are most. `falls_as` is the exponent p of the
    variance of a mini-batch's gradient, B^-p, between the smallest and the largest that were measured: 1 where samples
    are independent, less where a mini-batch shares a draw of its smoothing.

    Args:
        study: the study.
        measured: `results.noise` of its folder.
    """
    solutions = winners(measured)
    last = solutions.groupby(["cell", "number"])["epoch"].transform("max")
    solutions = solutions[solutions["epoch"] == last]
    rows = []
    for cell in study.list_cells():
        of_cell = solutions[solutions["cell"] == cell.name]
        for smoothed in (False, True) if cell.smoothing != "none" else (False,):
            found = of_cell[of_cell["smoothed"].eq(smoothed)]
            row = {**cell.values, "gradient": "smoothed" if smoothed else "plain", "n": found["number"].nunique()}
            rows.append(row | (_numbers(found) if len(found) else {"note": "not measured; `lbstudy noise` does"}))
    return pd.DataFrame(rows, columns=with_factors(COLUMNS, study)).astype(COLUMNS)


def _numbers(found: pd.DataFrame) -> dict[str, object]:
    sizes = sorted(found["mini_batch"].unique())
    finest = found[found["mini_batch"] == sizes[0]].set_index("repeat")
    scale, squared = stats.ratio(finest["trace"], finest["squared_norm"]), finest["squared_norm"].mean()
    bounded = scale.shape == "bounded" and squared > 0
    row: dict[str, object] = {
        "noise_scale": scale.value if squared > 0 else nan,
        "noise_scale_low": scale.low if bounded else nan, "noise_scale_high": scale.high if bounded else nan,
        "noise_scale_error": finest["scale_error"].mean(),
        "trace": finest["trace"].mean(), "squared_norm": squared, "falls_as": nan,
        "note": "" if squared > 0 else "the gradient cannot be told from zero",
    }  # fmt: skip
    if len(sizes) > 1:
        import numpy as np

        coarsest = found[found["mini_batch"] == sizes[-1]]
        ratio = (finest["trace"].mean() / sizes[0]) / (coarsest["trace"].mean() / sizes[-1])
        row["falls_as"] = float(np.log(ratio) / np.log(sizes[-1] / sizes[0]))
    return row
