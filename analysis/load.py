"""Records as tidy tables: a row per trial or confirmed run, a row per epoch. Minima are read in `minima/results.py`.

Files may be damaged or incomplete: what can be read is returned, and `frame.attrs["left_out"]` names the other files.

A study has thousands of trials, and a page many tables: who needs several of them takes a `Snapshot` of the folder,
which is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import wraps
from math import inf, nan
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pandas as pd

from lbstudy.records.folder import DataFact, StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.storage import StoragePath
from lbstudy.study.objective import sort_key
from lbstudy.study.spec import StudySpec

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]
CONFIRMED_METRICS = [
    *METRICS, "images", "clean_train_loss", "clean_train_accuracy", "test_loss", "test_accuracy",
]  # fmt: skip
AT_BEST = ["best_epoch", "test_at_best_epoch"]
KEY = ["cell", "optimizer", "batch_size", "smoothing", "number"]  # with further factors before the number, if any
CONFIRMED_KEY = [*KEY, "trial", "repeat", "rank", "published"]
OUTCOME = ["status", "epochs"]

Asked = ParamSpec("Asked")
Found = TypeVar("Found")


class Snapshot(StudyFolder):
    """A study's folder as it was when it was looked at: what is read of it is read once, when it is first asked for."""

    def __init__(self, folder: StudyFolder):
        super().__init__(folder.path)
        self.known: dict[object, Any] = {}  # what has been read, by what was asked

    @classmethod
    def of(cls, folder: StudyFolder) -> Snapshot:
        """Of this folder; itself, if it is one."""
        return folder if isinstance(folder, cls) else cls(folder)

    def study(self) -> StudySpec:
        """The study."""
        return _study(self)

    def of_data(self, fact: DataFact) -> int | None:
        """A number that its data are known by."""
        return _of_data(self, fact)

    @property
    def confirmation(self) -> Snapshot:
        """The folder of the confirmed runs."""
        return _confirmation(self)


def once(
    read: Callable[Concatenate[Snapshot, Asked], Found],
) -> Callable[Concatenate[StudyFolder, Asked], Found]:
    """A function that reads of a folder; of a `Snapshot` it reads once, and whoever asks again gets the same object."""

    @wraps(read)
    def reader(folder: StudyFolder, *asked: Asked.args, **options: Asked.kwargs) -> Found:
        snapshot, key = Snapshot.of(folder), (reader, *asked, *options.items())
        if key not in snapshot.known:
            snapshot.known[key] = read(snapshot, *asked, **options)
        return snapshot.known[key]

    return reader


@once
def _study(folder: Snapshot) -> StudySpec:
    return StudyFolder(folder.path).study()


@once
def _of_data(folder: Snapshot, fact: DataFact) -> int | None:
    return StudyFolder(folder.path).of_data(fact)


@once
def _confirmation(folder: Snapshot) -> Snapshot:
    return Snapshot(StudyFolder(folder.path).confirmation)


class Records(NamedTuple):
    """What lies in a folder."""

    sound: list[TrialRecord]  # by cell and number; a trial of the tuning that has ended is without its `run`
    damaged: list[StoragePath]


@once
def records(folder: Snapshot) -> Records:
    """All trials of a folder, or all confirmed runs of such a one."""
    found = Records([], [])
    for record in folder.each():
        if not isinstance(record, TrialRecord):
            found.damaged.append(record)
            continue
        if record.trial is None and record.status in FINISHED:
            record.run = {}  # half of what 100,000 of them would hold in memory, and no table shows it
        found.sound.append(record)
    return found


@once
def trials(folder: Snapshot) -> pd.DataFrame:
    """One row per trial: its cell, tuned values (as `params.NAME`), status, and the metrics of its last epoch.

    In a study that is tuned for a target its time to it is among these, infinite where it was missed and NaN where it
    is not known, and the `nearest` that it came.
    """
    found, damaged = records(folder)
    tuning = folder.study().tuning
    metrics = [*METRICS, *([tuning.metric, "nearest"] if tuning.target else [])]
    rows = (_key(record) | {"published": record.published} | _outcome(record, metrics) for record in found)
    frame = frame_of(rows, [*KEY, "published", *OUTCOME, *metrics, "seconds"], metrics)
    if tuning.target:
        missed = (frame["status"] == "completed") & frame[tuning.metric].isna()
        frame[tuning.metric] = frame[tuning.metric].mask(missed, inf)
    frame.attrs["left_out"] = [address(folder, path) for path in damaged]
    return frame


@once
def epochs(folder: Snapshot) -> pd.DataFrame:
    """One row per epoch of every trial: its cell and number, and all metrics reported."""
    found = records(folder).sound
    frame = pd.DataFrame(_columns(_key(record) | report for record in found for report in folder.epochs(record)))
    return frame if len(frame) else _without_rows(frame, [*KEY, "epoch", "seconds"])


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


@once
def confirmed(folder: Snapshot) -> pd.DataFrame:
    """One row per confirmed run.

    `trial` is the tuning trial whose configuration it repeats and `rank` that trial's rank in its cell now, 0 for the
    best, missing where it has not completed. `repeat` numbers the seeds, which are the same in every cell. Test and
    clean training metrics are those after the last epoch. `train_on` says which samples were trained on. `best_epoch`
    is that after which the validation metric was best, the first of equals, and `test_at_best_epoch` the test accuracy
    then: what early stopping would have reached. They are NaN of a run that trained on the validation samples, or has
    not completed.
    """
    at_best = _at_best_epoch(confirmed_epochs(folder), folder.study().tuning.metric)
    rows = []
    for run, key in _confirmed_runs(folder):
        train_on = run.run.get("train_on")
        validated = run.status == "completed" and train_on != "all"
        read: dict[str, object] = at_best.get((run.cell, run.number), {}) if validated else {}
        rows.append(key | {"train_on": train_on} | _outcome(run, CONFIRMED_METRICS) | read)
    numbers = [*CONFIRMED_METRICS, *AT_BEST]
    frame = frame_of(rows, [*CONFIRMED_KEY, "train_on", *OUTCOME, *numbers, "seconds"], numbers)
    frame.attrs["left_out"] = [address(folder, path) for path in records(folder.confirmation).damaged]
    return frame


@once
def confirmed_epochs(folder: Snapshot) -> pd.DataFrame:
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


def _at_best_epoch(epochs: pd.DataFrame, metric: str) -> dict[Hashable, Any]:
    """`AT_BEST` of each run, by its cell and number.

    Args:
        epochs: from `confirmed_epochs`.
        metric: what the study was tuned for; where it is no metric of an epoch, accuracy tells.
    """
    sign, metric = (-1, metric) if metric == "val_loss" else (1, "val_accuracy")
    known = epochs.dropna(subset=[metric, "test_accuracy"])
    best_first = known.assign(key=sign * known[metric]).sort_values(["key", "epoch"], ascending=[False, True])
    best = best_first.drop_duplicates(["cell", "number"]).set_index(["cell", "number"])
    return best[["epoch", "test_accuracy"]].set_axis(AT_BEST, axis="columns").to_dict("index")


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


@once
def keys_of_confirmed_runs(folder: Snapshot) -> dict[tuple[str, str], dict[str, object]]:
    """The columns that say which run it is, by the names of its cell and its folder."""
    return {(run.cell, f"{run.number:04d}"): key for run, key in _confirmed_runs(folder)}


@once
def _confirmed_runs(folder: Snapshot) -> list[tuple[TrialRecord, dict[str, object]]]:
    """The runs, each with the columns that say which it is."""
    runs = records(folder.confirmation).sound
    if not runs:
        return []
    ranks = ranked(folder.study(), trials(folder)).set_index(["cell", "number"])["rank"].to_dict()
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


def _columns(rows: Iterable[Mapping[str, object]]) -> dict[str, list[object]]:
    """The rows by columns, in the order in which these occur; NaN where a row has none. Rows that come one by one are
    never in memory all together."""
    columns: dict[str, list[object]] = {}
    for count, row in enumerate(rows):
        for name, value in row.items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = [nan] * count
            column.append(value)
        if len(row) < len(columns):
            for column in columns.values():
                if len(column) == count:
                    column.append(nan)
    return columns


def frame_of(rows: Iterable[Mapping[str, object]], columns: list[str], numbers: list[str]) -> pd.DataFrame:
    """The rows as a frame with the types that its columns have; it has all of them even where no row has."""
    frame = pd.DataFrame(_columns(rows))
    if not len(frame):
        frame = _without_rows(frame, columns)
    else:  # the further factors stand where `_key` has put them
        names, place = list(map(str, frame)), columns.index("number")
        columns = [*columns[:place], *names[names.index("smoothing") + 1 : names.index("number")], *columns[place:]]
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame]))).astype(dict.fromkeys(numbers, float))
    return frame.astype({"rank": "Int64"}) if "rank" in frame else frame


def _without_rows(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """An empty frame with these columns; names are text, so that it can be merged with frames that have rows."""
    frame = frame.reindex(columns=columns)
    return frame.astype({name: str for name in ("cell", "optimizer", "smoothing", "status") if name in frame})
