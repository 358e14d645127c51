"""Records as tidy tables: a row per trial or confirmed run, a row per epoch, a row per point of a landscape.

Files may be damaged or incomplete: what can be read is returned, and `frame.attrs["left_out"]` names the other files.
Where results may be of an older rule, `frame.attrs["outdated"]` names the files of such, which are left out, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

from lbstudy import storage
from lbstudy.analysis.rules import OldRule, require_rule
from lbstudy.records.folder import StudyFolder, TrialRecord
from lbstudy.storage import StoragePath
from lbstudy.study.spec import StudySpec

if TYPE_CHECKING:
    from lbstudy.analysis.minima.hessian import SpectralDensity
    from lbstudy.analysis.minima.sharpness import Sharpness

METRICS = ["val_accuracy", "val_loss", "train_loss", "step"]
CONFIRMED_METRICS = [
    *METRICS, "clean_train_loss", "clean_train_accuracy", "test_loss", "test_accuracy",
]  # fmt: skip
KEY = ["cell", "optimizer", "batch_size", "smoothing", "number"]
CONFIRMED_KEY = [*KEY, "trial", "repeat", "rank", "published"]
OUTCOME = ["status", "epochs"]

Kind = Literal["line", "plane", "interpolate", "trajectory"]
COORDINATES: dict[Kind, list[str]] = {
    "line": ["direction", "a"], "plane": ["a", "b"], "interpolate": ["a"], "trajectory": ["a", "b"],
}  # fmt: skip
POINT_METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_samples", "test_samples"]


def trials(folder: StudyFolder) -> pd.DataFrame:
    """One row per trial: its cell, tuned values (as `params.NAME`), status, and the metrics of its last epoch."""
    records, damaged = folder.scan()
    rows = [_key(record) | {"published": record.published} | _outcome(record, METRICS) for record in records]
    frame = _frame(rows, [*KEY, "published", *OUTCOME, *METRICS, "seconds"], METRICS)
    frame.attrs["left_out"] = [_address(folder, path) for path in damaged]
    return frame


def epochs(folder: StudyFolder) -> pd.DataFrame:
    """One row per epoch of every trial: its cell and number, and all metrics reported."""
    return pd.DataFrame([_key(record) | report for record in folder.trials() for report in folder.epochs(record)])


def ranked(study: StudySpec, trials: pd.DataFrame) -> pd.DataFrame:
    """The completed trials, best first by the study's metric after the last epoch, with their `rank` in their cell.

    Pruned trials are left out: they have not had the budget that the comparison is about.
    """
    ascending = study.tuning.direction == "minimize"
    completed = trials[trials["status"] == "completed"]
    best_first = completed.sort_values([study.tuning.metric, "number"], ascending=[ascending, True], kind="stable")
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
    frame = _frame(rows, [*CONFIRMED_KEY, "train_on", *OUTCOME, *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)
    frame.attrs["left_out"] = [_address(folder, path) for path in folder.confirmation.scan()[1]]
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
            left_out.append(_address(folder, where.trial_folder(run) / "epochs.jsonl"))
        else:
            rows += [key | entry for entry in entries]
    frame = _frame(rows, [*CONFIRMED_KEY, "epoch", *CONFIRMED_METRICS, "seconds"], CONFIRMED_METRICS)
    frame.attrs["left_out"] = left_out
    return frame


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


def landscape(folder: StudyFolder, kind: Kind, tuned: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per point of the landscapes of a kind around confirmed runs: which run, coordinates, and metrics.

    Coordinates are `direction` and `a` of a line, `a` and `b` of a plane and (in Euclidean distance) a trajectory, and
    `a` of an interpolation, where 0 is the small-batch solution and 1 the run's own. Losses may be infinite or NaN.
    `attrs["left_out"]` lists files that are damaged, the settings among them, or of no confirmed run; where the
    settings say that all was made by an older rule, there are no rows, and `attrs["outdated"]` lists the files.

    Args:
        folder: the study's folder.
        kind: which landscapes.
        tuned: `trials` of it, where they have been loaded already.
    """
    numbers = [*COORDINATES[kind], *POINT_METRICS]
    known = _keys_of_confirmed_runs(folder, tuned)
    parts, left_out, outdated = [], [], []
    paths: list[StoragePath] = sorted((folder.path / "landscape" / kind).glob("*/*/*.csv"))
    made = landscape_settings(folder, kind)
    if made and _is_outdated(kind, made):
        paths, outdated = [], [_address(folder, path) for path in paths]
    for path, content in zip(paths, storage.read_all(paths), strict=True):
        key = known.get((path.parent.parent.name, path.parent.name))
        points = _read_points(content, numbers)
        if key is None or points is None or not _is_numbered(path):
            left_out.append(_address(folder, path))
        else:
            parts.append(pd.DataFrame(key, points.index).join(points))
    settings = _settings_path(folder, kind)
    if settings.exists() and not made:
        left_out.append(_address(folder, settings))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*CONFIRMED_KEY, *numbers])
    frame = frame.astype(dict.fromkeys(numbers, float) | {"rank": "Int64"})
    frame.attrs |= {"left_out": left_out, "outdated": outdated}
    return frame


class Incomplete(NamedTuple):
    """A run some of whose points of a landscape are missing."""

    cell: str
    number: int
    points: int
    wanted: int


def list_incomplete(points: pd.DataFrame, kind: Kind) -> list[Incomplete]:
    """Runs some of whose points are missing: of those that another run has or, on a run's own plane, of its grid."""
    runs = points.groupby(["cell", "number"], sort=False)
    counts = runs.size()
    if kind == "trajectory":
        wanted = runs["a"].nunique() * runs["b"].nunique()
    else:
        wanted = pd.Series(len(points[COORDINATES[kind]].drop_duplicates()), counts.index)
    return [
        Incomplete(cell, number, counts[cell, number], wanted[cell, number])
        for cell, number in counts.index[counts < wanted]
    ]


def landscape_settings(folder: StudyFolder, kind: Kind) -> dict[str, Any]:
    """How the landscapes of a kind were looked at: directions, normalisation, samples, seed; empty if unknown."""
    settings = _parse(storage.read(_settings_path(folder, kind)))
    return settings if isinstance(settings, dict) else {}


def _settings_path(folder: StudyFolder, kind: Kind) -> StoragePath:
    return folder.path / "landscape" / kind / "settings.json"


def trajectories(folder: StudyFolder) -> dict[tuple[str, int], dict[str, Any]]:
    """The path of each run through its plane, by cell and number: `path`, a point per checkpoint and the final one,
    (0, 0), last; `explained`, the share of the checkpoints' variance along either axis. Damaged files do not count."""
    found = {}
    paths: list[StoragePath] = sorted((folder.path / "landscape" / "trajectory").glob("*/*/path.json"))
    for path, text in zip(paths, storage.read_all(paths), strict=True):
        content = _parse(text)
        try:
            steps = [(float(x), float(y)) for x, y in content["path"]]
            first, second = map(float, content["explained"])
            key = (path.parent.parent.name, int(path.parent.name))
        except (KeyError, TypeError, ValueError):
            continue
        found[key] = {"path": steps, "explained": (first, second)}
    return found


def sharpness(folder: StudyFolder, tuned: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per confirmed run whose sharpness was measured: which run, and `Sharpness.row()`.

    `attrs["left_out"]` lists files that are damaged or of no confirmed run, `attrs["outdated"]` those that were
    measured by an older rule.

    Args:
        folder: the study's folder.
        tuned: `trials` of it, where they have been loaded already.
    """
    known = _keys_of_confirmed_runs(folder, tuned)
    rows, left_out, outdated = [], [], []
    for path, measured in _sharpness_files(folder):
        key = known.get((path.parent.name, path.name.removesuffix(".json")))
        if measured == "outdated":
            outdated.append(_address(folder, path))
        elif key is None or measured is None:
            left_out.append(_address(folder, path))
        else:
            rows.append(key | measured.row())
    frame = _frame(rows, CONFIRMED_KEY, [])
    frame.attrs |= {"left_out": left_out, "outdated": outdated}
    return frame


def spectral_densities(folder: StudyFolder) -> dict[tuple[str, int], SpectralDensity]:
    """The density of the Hessian's eigenvalues of each run, by cell and number. Damaged files do not count,
    nor do those of an older rule."""
    return {
        (path.parent.name, int(path.name.removesuffix(".json"))): measured.density
        for path, measured in _sharpness_files(folder)
        if measured is not None and measured != "outdated"
    }


def _is_outdated(kind: str, made: dict[str, Any]) -> bool:
    try:
        require_rule(kind, made)
    except OldRule:
        return True
    return False


def _sharpness_files(folder: StudyFolder) -> Iterator[tuple[StoragePath, Sharpness | Literal["outdated"] | None]]:
    """Each run's file, and what it holds: "outdated" if by an older rule, None if it is damaged or a copy."""
    from lbstudy.analysis.minima.sharpness import Sharpness  # here, since it imports SciPy's optimisers

    paths: list[StoragePath] = sorted((folder.path / "sharpness").glob("*/*.json"))
    for path, text in zip(paths, storage.read_all(paths), strict=True):
        measured: Sharpness | Literal["outdated"] | None
        try:
            measured = Sharpness.from_json(_parse(text)) if _is_numbered(path) else None
        except OldRule:
            measured = "outdated"
        except (KeyError, TypeError, ValueError, AttributeError):  # whatever a file may hold instead
            measured = None
        yield path, measured


def _is_numbered(path: StoragePath) -> bool:
    """Whether a file has a name that such files are given, as 0003.json; copies have others."""
    return path.name.partition(".")[0].isdigit()


def _read_points(content: bytes, numbers: list[str]) -> pd.DataFrame | None:
    """The points of a file, or None if it is damaged: a column is missing, or the last line was cut short."""
    if not content.endswith(b"\n"):
        return None
    try:
        points = pd.read_csv(BytesIO(content), keep_default_na=False, na_values=["nan"])[numbers].astype(float)
    except (KeyError, ValueError):  # among them pandas' ParserError, and UnicodeDecodeError
        return None
    coordinates = points[[n for n in numbers if n not in POINT_METRICS]]
    return None if coordinates.isna().any(axis=None) else points


def _parse(text: bytes | None) -> Any:
    """What a JSON file holds, or None if it is missing or damaged."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def _address(folder: StudyFolder, path: StoragePath) -> str:
    """A file's place in the folder."""
    return str(path).removeprefix(str(folder.path)).lstrip("/")


def _keys_of_confirmed_runs(
    folder: StudyFolder, tuned: pd.DataFrame | None
) -> dict[tuple[str, str], dict[str, object]]:
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


def _frame(rows: list[dict[str, object]], columns: list[str], numbers: list[str]) -> pd.DataFrame:
    """The rows as a frame with the types that its columns have; it has all of them even where no row has."""
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame]))).astype(dict.fromkeys(numbers, float))
    return frame.astype({"rank": "Int64"}) if "rank" in frame else frame
