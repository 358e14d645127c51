"""Tables of a study: the best configuration of each cell, the best trials, how far each cell has come.

And how any table becomes text. What compares cells is in `gaps`, `targets` and `health`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from math import inf, nan, sqrt
from typing import Any, Literal

import pandas as pd

from lbstudy.analysis import load, stats
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import is_held
from lbstudy.records.trial import FINISHED
from lbstudy.study.factors import labels
from lbstudy.study.spec import Cell, StudySpec

COUNTS = list(FINISHED)
LOST = ["confirmed_diverged", "confirmed_unfinished"]
ENDS = ["test_min", "test_max"]
CONFIRMED: dict[str, Any] = {  # columns of the best configurations where runs have been confirmed
    "test_accuracy": float, "test_sd": float, "n": "Int64", "test_low": float, "test_high": float,
    "test_at_best_epoch": float, **dict.fromkeys(ENDS, float), **dict.fromkeys(LOST, "Int64"),
}  # fmt: skip

READINGS = ("test_accuracy", "test_at_best_epoch")
"""When a confirmed run's test accuracy is read: after its last epoch, and after its best one by validation."""

FAILED_SHARE = 0.5
"""A run with less than this share of its cell's best test accuracy has failed: it has hardly learnt."""

Format = Literal["csv", "json", "markdown", "latex"]


def best_trials(study: StudySpec, trials: pd.DataFrame, top: int = 1) -> pd.DataFrame:
    """The `top` completed trials of each cell, best first; see `load.ranked`."""
    ranked = load.ranked(study, trials)
    return ranked[ranked["rank"] < top].drop(columns="rank")


def best_configs(folder: StudyFolder) -> pd.DataFrame:
    """A row per cell: its best configuration and result, how its trials ended, and an edge flag. Here as in every table
    a column for each further factor of the cells, named by its key, follows the smoothing.

    `edge` names each parameter whose best value lies at an end of its range (`learning_rate:high`): a better value may
    lie outside (`edges`). In a study that was tuned for a target there is the best trial's time to it, infinite where
    it was missed, and whether it was `reached`; accuracy, loss and epochs are then those at which the trial ended. A
    cell without a completed trial has counts but no values. Once runs have been confirmed there is the best
    configuration's test accuracy too: mean, standard deviation, 95 % interval (`stats.mean_accuracy`), the mean at each
    run's best validation epoch (`load.confirmed`), least and largest of the `n` runs that completed, and how many
    diverged or have not ended well. `workers` is there where runs were trained by different numbers of them.
    `attrs["damaged"]` says in sentences which records do not count.
    """
    folder = load.Snapshot.of(folder)
    study, trials, confirmed = folder.study(), load.trials(folder), load.confirmed(folder)
    best = best_trials(study, trials).set_index("cell")
    tuned = study.tuned()
    rows = []
    for cell in study.list_cells():
        row: dict[str, object] = {**cell.values}
        found = best.loc[cell.name] if cell.name in best.index else None
        params = {} if found is None else {n: float(found[f"params.{n}"]) for n in study.ranges(cell)}  # type: ignore[arg-type]
        row |= {name: params.get(name) for name in tuned}
        if study.tuning.target:
            time = None if found is None else found[study.tuning.metric]
            row |= {study.tuning.metric: time, "reached": time if time is None else "no" if time == inf else "yes"}
        row |= {name: None if found is None else found[name] for name in ("val_accuracy", "val_loss", "epochs")}
        if len(confirmed):
            row |= _confirmed_result(confirmed, cell.name)
        counts = count_statuses(trials, cell.name)
        row["trials"] = counts["ended"]
        row |= {status: counts[status] for status in COUNTS}
        row["edge"] = " ".join(f"{name}:{end}" for name, end in edges(folder, cell).items())
        row["workers"] = workers_of(trials, confirmed, cell.name)
        rows.append(row)
    numbers = [*tuned, *([study.tuning.metric] if study.tuning.target else []), "val_accuracy", "val_loss"]
    types: dict[str, Any] = {"epochs": "Int64", **dict.fromkeys(numbers, float)}
    frame = pd.DataFrame(rows).astype(types | (CONFIRMED if len(confirmed) else {}))
    if "," not in workers_of(trials, confirmed):  # one number, or none known
        frame = frame.drop(columns="workers")
    frame.attrs["damaged"] = load.list_damaged(trials, confirmed, load.confirmed_epochs(folder))
    return frame


def edges(folder: StudyFolder, cell: Cell) -> dict[str, str]:
    """The parameters of a cell whose best value lies at an end of its range, and which end.

    Not where the range is known to be level: where a trial in its middle half is as good (`as_good`). That hides, too,
    an end towards which accuracy rises by no more than a few standard errors over the whole range.
    """
    trials, found = as_good(folder, cell), dict[str, str]()
    if trials.empty:
        return found
    for name, searched in folder.study().ranges(cell).items():
        values = trials[f"params.{name}"].astype(float)
        level = any(0.25 <= searched.position(value) <= 0.75 for value in values)
        if (end := searched.edge(values.iloc[0])) and not level:
            found[name] = end
    return found


@load.once
def as_good(folder: load.Snapshot, cell: Cell) -> pd.DataFrame:
    """The best completed trial of a cell, and those whose validation accuracy lies within one standard error of its.

    So Breiman et al. call models equal (Classification and Regression Trees, 1984, section 3.4.3). The error is that of
    a share of so many images. In a study that goes by another metric, and where the number of images is not known, the
    best trial is alone.
    """
    study, trials, images = folder.study().variant(cell), load.trials(folder), folder.of_data("training images")
    ranked = load.ranked(study, trials[trials["cell"] == cell.name])
    if ranked.empty or study.tuning.metric != "val_accuracy" or images is None:
        return ranked.head(1)
    best = float(ranked["val_accuracy"].iloc[0])
    return ranked[ranked["val_accuracy"] >= best - sqrt(best * (1 - best) / study.dataset.validation_samples(images))]


def progress(folder: StudyFolder) -> pd.DataFrame:
    """A row per cell: trials that have ended, of how many, how they ended, and the best value so far.

    Trials that run are `interrupted` where no driver is at work. `attrs["damaged"]`: as for `best_configs`.
    """
    folder = load.Snapshot.of(folder)
    study, trials, at_work = folder.study(), load.trials(folder), is_held(folder.path)
    best = best_trials(study, trials).set_index("cell")
    rows = []
    for cell in study.list_cells():
        counts = count_statuses(trials, cell.name)
        row: dict[str, object] = {"cell": cell.name, "done": counts["ended"], "of": study.tuning.trials}
        row["running" if at_work else "interrupted"] = counts["running"]
        row |= {status: counts[status] for status in COUNTS}
        row[f"best {study.tuning.metric}"] = best[study.tuning.metric].get(cell.name)
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs["damaged"] = load.list_damaged(trials, trials.head(0))
    return frame


def count_statuses(runs: pd.DataFrame, cell: str) -> dict[str, int]:
    """How many of a cell's trials, or confirmed runs, have each status; `ended`: in whichever way."""
    found = Counter(runs.loc[runs["cell"] == cell, "status"])
    counts = {status: found[status] for status in ("running", *COUNTS)}
    return counts | {"ended": sum(counts[status] for status in COUNTS)}


def workers_of(trials: pd.DataFrame, confirmed: pd.DataFrame, cell: str | None = None) -> str:
    """The numbers of data-parallel workers that trained a cell's runs, or all: `1`, or `1, 2` where they differ.

    The number changes the rounding of sums, which training amplifies, so a table names the mix.
    """
    found = {
        number
        for runs in (trials, confirmed)
        if "workers" in runs
        for text in runs.loc[runs["cell"].eq(cell or runs["cell"]), "workers"]
        for number in text.split(", ")
        if number
    }
    return ", ".join(sorted(found, key=int))


def winners(confirmed: pd.DataFrame) -> pd.DataFrame:
    """Of confirmed runs, or their epochs, those that repeat what is now their cell's best configuration."""
    return confirmed[confirmed["rank"].to_numpy(float, na_value=nan) == 0]


def accuracy_by_repeat(confirmed: pd.DataFrame, cell: str, metric: str = "test_accuracy") -> pd.Series:
    """Test accuracies of a cell's best configuration, by repeat: those of the confirmed runs that completed.

    Args:
        confirmed: `load.confirmed` of the study's folder.
        cell: its name.
        metric: one of READINGS.
    """
    runs = winners(confirmed[(confirmed["cell"] == cell) & (confirmed["status"] == "completed")])
    return pd.Series(runs[metric].to_numpy(float), index=pd.Index(runs["repeat"], name="repeat")).dropna()


def failed_runs(accuracies: pd.Series) -> int:
    """How many runs of a cell, by their test accuracies, have failed where others have not (FAILED_SHARE)."""
    return int((accuracies < FAILED_SHARE * accuracies.max()).sum())


def _confirmed_result(confirmed: pd.DataFrame, cell: str) -> dict[str, object]:
    accuracies = accuracy_by_repeat(confirmed, cell)
    mean, counts = stats.mean_accuracy(accuracies), count_statuses(winners(confirmed), cell)
    stopped = accuracy_by_repeat(confirmed, cell, "test_at_best_epoch")
    rest = stopped.mean() if len(stopped) == mean.n else nan, accuracies.min(), accuracies.max()
    return dict(zip(CONFIRMED, (*mean, *rest, counts["diverged"], counts["running"] + counts["failed"]), strict=True))


def budget_sentence(study: StudySpec, configs: pd.DataFrame) -> str:
    """Whether every cell has had the same number of trials, in words."""
    counts = configs["trials"]
    if (counts == study.tuning.trials).all():
        return f"Every cell has had the same budget: {study.tuning.trials} trials."
    cells = zip(study.list_cells(), counts, strict=True)
    behind = ", ".join(f"{cell.name}: {count}" for cell, count in cells if count != study.tuning.trials)
    return f"Not a fair comparison yet: the budget is {study.tuning.trials} trials a cell, but {behind}."


def render(table: pd.DataFrame, style: Format) -> str:
    """A table as text, whatever characters its text holds.

    CSV and JSON hold full precision (JSON has no infinity: it is the string "Infinity"). Markdown and LaTeX
    (booktabs) are for reading, see `for_reading`.
    """
    if style == "csv":
        return table.to_csv(index=False).rstrip("\n")
    if style == "json":
        finite = table.astype({c: object for c in table.select_dtypes(float) if table[c].abs().eq(inf).any()})
        finite = finite.replace({inf: "Infinity", -inf: "-Infinity"})
        return finite.to_json(orient="records", indent=2, double_precision=15)
    shown = for_reading(table)
    if style == "markdown":
        return shown.map(_markdown).rename(columns=_markdown).to_markdown(index=False, disable_numparse=True)
    return (
        shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1).to_latex(hrules=True)
    )


def _markdown(text: str) -> str:
    """Text as it is: no HTML, no emphasis, no code, no link, no mathematics, no end of a table's cell."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;"}
    text = "".join(entities.get(character, character) for character in text)
    text = re.sub(r"[|*`~$]|\[(?=.*\]\()|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return " ".join(text.split())


def lean(configs: pd.DataFrame) -> pd.DataFrame:
    """The best configurations as `for_reading` wants them: the interval named after the test accuracy; no counts of
    lost confirmed runs where there are none; no least and largest accuracies where they are not far apart, so that the
    mean says what there is to say."""
    idle = [name for name in LOST if name in configs and configs[name].eq(0).all()]
    if set(ENDS) <= set(configs) and not (configs["test_min"] < FAILED_SHARE * configs["test_max"]).any():
        idle += ENDS
    lean = configs.drop(columns=idle)
    return lean.rename(columns={"test_low": "test_accuracy_low", "test_high": "test_accuracy_high"})


def for_terminal(configs: pd.DataFrame) -> pd.DataFrame:
    """The best configurations, narrow enough for a terminal: three digits, the four counts in one column (`c/p/d/f`:
    completed, pruned, diverged, failed), whose sum the trials are, test accuracy after the last epoch with its
    interval, and no column that is empty or tells of lost runs where there are none."""
    shown = for_reading(lean(configs).drop(columns=["test_sd", "test_at_best_epoch"], errors="ignore"), digits=3)
    shown.insert(list(shown).index("trials"), "c/p/d/f", shown[COUNTS].agg("/".join, axis=1))
    shown = shown.drop(columns=["trials", *COUNTS])
    return shown.loc[:, [c for c in shown if c == "edge" or (shown[c] != "-").any()]]


def for_reading(table: pd.DataFrame, digits: int = 4) -> pd.DataFrame:
    """The table as text for people: so many significant digits, and a dash where there is nothing to say.

    An estimate and the interval beside it (`gap`, `gap_low`, `gap_high`) become one column, `0.021 [0.01, 0.032]`; so
    do a mean and its standard deviation (`trace`, `trace_sd`), `5.1 ± 0.3`. Factors go by a short name.
    """

    def text(value: object) -> str:
        if value is None or value is pd.NA or value != value or value == "":
            return "-"
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else stats.written(value, digits)

    shown = table.map(text).astype(object)
    for name in [c for c in shown if f"{c}_low" in shown and f"{c}_high" in shown]:
        low, high = shown.pop(f"{name}_low"), shown.pop(f"{name}_high")
        bare = (low == "-") | (shown[name] == "-")  # an interval alone is none
        shown[name] = shown[name].where(bare, shown[name] + " [" + low + ", " + high + "]")
    for name in [c for c in shown if f"{c}_sd" in shown]:
        sd = shown.pop(f"{name}_sd")
        shown[name] = shown[name].where(sd == "-", shown[name] + " ± " + sd)
    return shown.rename(columns=short_names(shown))


def with_factors(columns: Iterable[str], study: StudySpec) -> list[str]:
    """A table's columns, with those of a study's further factors after the smoothing."""
    return [name for column in columns for name in ([column, *study.factors] if column == "smoothing" else [column])]


def short_names(table: pd.DataFrame) -> dict[str, str]:
    """The columns of further factors, which go by the keys of a study -> their names in a table for reading."""
    columns = list(map(str, table))
    keys = [name for name in columns if name.split(".")[0] in StudySpec.model_fields]
    return {key: label if label not in columns else key for key, label in labels(keys).items()}


def holds_numbers(column: pd.Series) -> bool:
    """Whether a column of such text holds nothing but numbers, with whatever interval or deviation, and dashes."""
    return bool(column.str.fullmatch(r"-|-?(\d[\d.e+-]*|inf)( (\[|±).*)?").all())
