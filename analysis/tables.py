"""Tables of a study: the best configuration of each cell, the best trials, how far each cell has come."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from analysis import load
from lbstudy.records import FINISHED, StudyFolder
from lbstudy.runspec import Hyperparameters
from lbstudy.study import StudySpec

COUNTS = list(FINISHED)
ALWAYS_SHOWN = ["learning_rate", "mixup_alpha", "noise_magnitude"]

Format = Literal["csv", "json", "markdown", "latex"]


def best_trials(study: StudySpec, trials: pd.DataFrame, top: int = 1) -> pd.DataFrame:
    """The `top` completed trials of each cell, best first, by the study's metric after the last epoch.

    Pruned trials are left out: they have not had the budget that the comparison is about.
    """
    ascending = study.tuning.direction == "minimize"
    completed = trials[trials["status"] == "completed"]
    ranked = completed.sort_values([study.tuning.metric, "number"], ascending=[ascending, True], kind="stable")
    return ranked.groupby("cell", sort=False).head(top)


def best_configs(folder: StudyFolder) -> pd.DataFrame:
    """A row per cell: its best configuration and result, how its trials ended, and an edge flag.

    `edge` names each parameter whose best value lies within 5 % of an end of its range (`learning_rate:high`): a
    better value may lie outside. A cell without a completed trial has counts but no values.
    """
    study, trials = folder.study(), load.trials(folder)
    best = best_trials(study, trials).set_index("cell")
    tuned = [
        n for n in Hyperparameters.names() if n in ALWAYS_SHOWN or any(n in study.ranges(c) for c in study.list_cells())
    ]
    rows = []
    for cell in study.list_cells():
        row: dict[str, object] = {
            "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
        }  # fmt: skip
        found = best.loc[cell.name] if cell.name in best.index else None
        params = {} if found is None else {n: float(found[f"params.{n}"]) for n in study.ranges(cell)}  # type: ignore[arg-type]
        row |= {name: params.get(name) for name in tuned}
        row |= {name: None if found is None else found[name] for name in ("val_accuracy", "val_loss", "epochs")}
        statuses = trials.loc[trials["cell"] == cell.name, "status"]
        row["trials"] = int(statuses.isin(COUNTS).sum())
        row |= {status: int((statuses == status).sum()) for status in COUNTS}
        edges = {name: study.ranges(cell)[name].edge(value) for name, value in params.items()}
        row["edge"] = " ".join(f"{name}:{end}" for name, end in edges.items() if end)
        rows.append(row)
    return pd.DataFrame(rows).astype({"epochs": "Int64", **dict.fromkeys([*tuned, "val_accuracy", "val_loss"], float)})


def progress(folder: StudyFolder) -> pd.DataFrame:
    """A row per cell: trials that have ended, of how many, how they ended, and the best value so far."""
    study, trials = folder.study(), load.trials(folder)
    best = best_trials(study, trials).set_index("cell")
    rows = []
    for cell in study.list_cells():
        statuses = trials.loc[trials["cell"] == cell.name, "status"]
        row: dict[str, object] = {
            "cell": cell.name, "done": int(statuses.isin(COUNTS).sum()), "of": study.tuning.trials,
            "running": int((statuses == "running").sum()),
        }  # fmt: skip
        row |= {status: int((statuses == status).sum()) for status in COUNTS}
        row[f"best {study.tuning.metric}"] = best[study.tuning.metric].get(cell.name)
        rows.append(row)
    return pd.DataFrame(rows)


def budget_sentence(study: StudySpec, configs: pd.DataFrame) -> str:
    """Whether every cell has had the same number of trials, in words."""
    counts = configs["trials"]
    if (counts == study.tuning.trials).all():
        return f"Every cell has had the same budget: {study.tuning.trials} trials."
    behind = ", ".join(
        f"{row.optimizer} {row.batch_size} {row.smoothing}: {row.trials}"
        for row in configs.itertuples()
        if row.trials != study.tuning.trials
    )
    return f"Not a fair comparison yet: the budget is {study.tuning.trials} trials a cell, but {behind}."


def render(table: pd.DataFrame, style: Format) -> str:
    """A table as text. CSV and JSON hold full precision, markdown and LaTeX (booktabs) four digits."""
    if style == "csv":
        return table.to_csv(index=False).rstrip("\n")
    if style == "json":
        return table.to_json(orient="records", indent=2, double_precision=15)
    shown = for_reading(table)
    if style == "markdown":
        return shown.to_markdown(index=False, disable_numparse=True)
    return (
        shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1).to_latex(hrules=True)
    )


def for_terminal(configs: pd.DataFrame) -> pd.DataFrame:
    """The best configurations, narrow enough for a terminal: three digits, the four counts in one column (`c/p/d/f`:
    completed, pruned, diverged, failed), and no column that is empty."""
    shown = for_reading(configs, digits=3)
    counts = shown[COUNTS].agg("/".join, axis=1)
    shown = shown.drop(columns=COUNTS)
    shown.insert(list(shown).index("trials") + 1, "c/p/d/f", counts)
    return shown.loc[:, [c for c in shown if c == "edge" or (shown[c] != "-").any()]]


def for_reading(table: pd.DataFrame, digits: int = 4) -> pd.DataFrame:
    """The table as text for people: so many significant digits, and a dash where there is nothing to say."""

    def text(value: object) -> str:
        if value is None or value is pd.NA or value != value or value == "":
            return "-"
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    return table.map(text)
