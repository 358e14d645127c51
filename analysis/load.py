"""Records as tidy tables: a row per trial or confirmed run, a row per epoch. Minima are read in `minima/results.py`.

Files may be damaged or incomplete: what can be read is returned, and `frame.attrs["left_out"]` names the other files.
"""

from __future__ import annotations

from math import inf

import pandas as pd

from lbstudy.records.folder import StudyFolder, TrialRecord
from lbstudy.storage import StoragePath
from lbstudy.study.objective import sort_key
from lbstudy.study.spec import StudySpec

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]
CONFIRMED_METRICS = [
    *METRICS, "images", "clean_train_loss", "clean_train_accuracy", "test_loss", "test_accuracy",
]  # fmt: skip
KEY = ["cell", "optimizer", "batch_size", "smoothing", "number"]  # with further factors before the number, if any
CONFIRMED_KEY = [*KEY, "trial", "repeat", "rank", "published"]
OUTCOME = ["status", "epochs"]


def trials(folder: StudyFolder) -> pd.DataFrame:
    """One row per trial: its cell, tuned values (as `params.NAME`), status, and the metrics of its last epoch.

    In a study that is tuned for a target its time to it is among these, infinite where it was missed and NaN where it
    is not known, and the `nearest` that it came.
    """
    records, damaged = folder.scan()
    tuning = folder.study().tuning
    metrics = [*METRICS, *([tuning.metric, "nearest"] if tuning.target else [])]
    rows = [_key(record) | {"published": record.published} | _outcome(record, metrics) for record in records]
    frame = frame_of(rows, [*KEY, "published", *OUTCOME, *metrics, "seconds"], metrics)
    if tuning.target:
        missed = (frame["status"] == "completed") & frame[tuning.metric].isna()
        frame[tuning.metric] = frame[tuning.metric].mask(missed, inf)
    frame.attrs["left_out"] = [address(folder, path) for path in damaged]
    return frame


def epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every trial: its cell and number, and all metrics reported."""
    return pd.DataFrame([_key(record) | report for record in folder.trials() for report in folder.epochs(record)])


def of_variant(rows: pd.DataFrame, variant: StudySpec) -> pd.DataFrame:
    """Those of a study's rows, of a frame or a table, that are about the cells of one of its variants."""
    if "cell" in rows:
        return rows[rows["cell"].isin([cell.name for cell in variant.list_cells()])]
    for key, values in variant.factors.items():
        rows = rows[rows[key].isin(list(values))]
    return rows


def ranked(study: StudySpec, trials: pd.DataFrame) -> pd.DataFrame:
    """The completed trials, best first by the study's metric, with their `rank` in their cell.

    Pruned trials are left out: they have not had the budget that the comparison is about.
    """
    completed = trials[trials["status"] == "completed"]
    keys = [sort_key(study.tuning, row) for row in completed.to_dict("records")]
    best_first = completed.assign(key=keys).sort_values(["key", "number"], kind="stable").drop(columns="key")
    return best_first.assign(rank=best_first.groupby("cell", sort=False).cumcount())


def confirmed(folder: StudyFolder, tuned: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per confirmed run.

    `trial` is the tuning trial whose configuration it repeats and `rank` that trial's rank in its cell now, 0 for the
    best, missing where it has not completed. `repeat` numbers the seeds, which are the same in every cell. Test and
    clean training metrics are those after the last epoch. `train_on` says which samples were trained on.

    Args:
        folder: the study's folder.
        tuned: `trials` of it, where they have been loaded already: many take a second to read.
    """
    rows = [
        key | {"train_on": run.run.get("train_on")} | _outcome(run, CONFIRMED_METRICS)
        for run, key in _confirmed_runs(folder, tuned)
    ]
    frame = frame_of(rows, [*CONFIRMED_KEY, "train_on", *OUTCOME, *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)
    frame.attrs["left_out"] = [address(folder, path) for path in folder.confirmation.scan()[1]]
    return frame


def confirmed_epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every confirmed run; see `confirmed`. `seconds` are the epoch's, with its evaluation.

    A run that has ended, but of whose epochs some are missing or damaged, has no rows: `attrs["left_out"]`.
    """
    where = folder.confirmation
    rows, left_out = [], []
    for run, key in _confirmed_runs(folder):
        entries = where.epochs(run)
        if len(entries) < run.epochs and run.status != "running":
            left_out.append(address(folder, where.trial_folder(run) / "epochs.jsonl"))
        else:
            rows += [key | entry for entry in entries]
    frame = frame_of(rows, [*CONFIRMED_KEY, "epoch", *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)
    frame.attrs["left_out"] = left_out
    return frame


def evaluations(epochs: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """A row per evaluation, those within epochs too, in the order of each run's steps.

    `epochs` counts a part of one by its steps; `seconds` are those of the run so far. What was not measured is NaN.

    Args:
        epochs: from `epochs` or `confirmed_epochs`.
        metric: of the evaluations within epochs leave out those that have not measured it.
    """
    run = ["cell", "number"]
    series = epochs.sort_values([*run, "epoch"])
    ended = series.groupby(run)["seconds"].cumsum()
    whole = series.assign(epochs=series["epoch"], seconds=ended).drop(columns="within", errors="ignore")
    if "within" not in series:
        return whole
    before = list(series)[: list(series).index("epoch") + 1]
    keys = [name for name in series if name in before or name in CONFIRMED_KEY]
    rows = [
        key | entry | {"seconds": end - length + entry["seconds"]}
        for key, end, length, inner in zip(
            series[keys].to_dict("records"), ended, series["seconds"], series["within"], strict=True
        )
        for entry in (inner if isinstance(inner, list) else [])
        if metric is None or metric in entry
    ]
    if not rows:
        return whole
    within = pd.DataFrame(rows).astype({name: whole[name].dtype for name in keys})
    return pd.concat([whole, within], ignore_index=True).sort_values([*run, "step"], kind="stable", ignore_index=True)


def list_damaged(trials: pd.DataFrame, confirmed: pd.DataFrame, epochs: pd.DataFrame | None = None) -> list[str]:
    """Which records do not count because they are damaged, a sentence for each kind.

    Args:
        trials, confirmed: from the functions of this name.
        epochs: from `confirmed_epochs`.
    """
    mend = {"`lbstudy run` runs them again": trials, "`lbstudy confirm` runs them again": confirmed}
    if epochs is not None:
        mend["remove their folders, and `lbstudy confirm` runs them again"] = epochs
    files = {command: frame.attrs.get("left_out", []) for command, frame in mend.items()}
    return [f"Damaged, and left out: {', '.join(names)}; {command}." for command, names in files.items() if names]


def address(folder: StudyFolder, path: StoragePath) -> str:
    """A file's place in the folder."""
    return str(path).removeprefix(str(folder.path)).lstrip("/")


def keys_of_confirmed_runs(folder: StudyFolder, tuned: pd.DataFrame | None) -> dict[tuple[str, str], dict[str, object]]:
    """The columns that say which run it is, by the names of its cell and its folder."""
    return {(run.cell, f"{run.number:04d}"): key for run, key in _confirmed_runs(folder, tuned)}


def _confirmed_runs(
    folder: StudyFolder, tuned: pd.DataFrame | None = None
) -> list[tuple[TrialRecord, dict[str, object]]]:
    """The runs, each with the columns that say which it is."""
    runs = folder.confirmation.trials()
    if not runs:
        return []
    best_first = ranked(folder.study(), trials(folder) if tuned is None else tuned)
    ranks = best_first.set_index(["cell", "number"])["rank"].to_dict()
    return [
        (
            run,
            _key(run)
            | {"trial": run.trial, "repeat": run.repeat, "rank": ranks.get((run.cell, run.trial))}
            | {"published": run.published},
        )
        for run in runs
    ]


def _key(record: TrialRecord) -> dict[str, object]:
    return {
        "cell": record.cell,
        "optimizer": record.optimizer,
        "batch_size": record.batch_size,
        "smoothing": record.smoothing,
        **record.factors,
        "number": record.number,
    }


def _outcome(record: TrialRecord, metrics: list[str]) -> dict[str, object]:
    return (
        {"status": record.status, "epochs": record.epochs}
        | {metric: record.metrics.get(metric) for metric in metrics}
        | {"seconds": record.seconds, "started": record.started, "device": record.device, "seed": record.seed}
        | {"workers": ", ".join(map(str, record.workers))}
        | {f"params.{name}": value for name, value in record.params.items()}
    )


def frame_of(rows: list[dict[str, object]], columns: list[str], numbers: list[str]) -> pd.DataFrame:
    """The rows as a frame with the types that its columns have; it has all of them even where no row has."""
    frame = pd.DataFrame(rows)
    if rows:  # the further factors stand where `_key` has put them
        names, place = list(map(str, frame)), columns.index("number")
        columns = [*columns[:place], *names[names.index("smoothing") + 1 : names.index("number")], *columns[place:]]
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame]))).astype(dict.fromkeys(numbers, float))
    return frame.astype({"rank": "Int64"}) if "rank" in frame else frame
