"""What was measured of minima as tidy tables: a row per point of a landscape, a row per run whose sharpness is known.

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
from lbstudy.analysis.load import CONFIRMED_KEY, Snapshot, address, frame_of, keys_of_confirmed_runs, once
from lbstudy.analysis.rules import OldRule, require_rule
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StoragePath

if TYPE_CHECKING:
    from lbstudy.analysis.minima.hessian import SpectralDensity
    from lbstudy.analysis.minima.sharpness import Sharpness

Kind = Literal["line", "plane", "interpolate", "trajectory"]
COORDINATES: dict[Kind, list[str]] = {
    "line": ["direction", "a"], "plane": ["a", "b"], "interpolate": ["a"], "trajectory": ["a", "b"],
}  # fmt: skip
POINT_METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_samples", "test_samples"]


@once
def landscape(folder: Snapshot, kind: Kind) -> pd.DataFrame:
    """One row per point of the landscapes of a kind around confirmed runs: which run, coordinates, and metrics.

    Coordinates are `direction` and `a` of a line, `a` and `b` of a plane and (in Euclidean distance) a trajectory, and
    `a` of an interpolation, where 0 is the small-batch solution and 1 the run's own. Losses may be infinite or NaN.
    `attrs["left_out"]` lists files that are damaged, the settings among them, or of no confirmed run; where the
    settings say that all was made by an older rule, there are no rows, and `attrs["outdated"]` lists the files.

    Args:
        folder: the study's folder.
        kind: which landscapes.
    """
    numbers = [*COORDINATES[kind], *POINT_METRICS]
    known = keys_of_confirmed_runs(folder)
    parts, left_out, outdated = [], [], []
    paths: list[StoragePath] = sorted((folder.path / "landscape" / kind).glob("*/*/*.csv"))
    made = landscape_settings(folder, kind)
    if made and _is_outdated(kind, made):
        paths, outdated = [], [address(folder, path) for path in paths]
    for path, content in zip(paths, storage.read_all(paths), strict=True):
        key = known.get((path.parent.parent.name, path.parent.name))
        points = _read_points(content, numbers)
        if key is None or points is None or not _is_numbered(path):
            left_out.append(address(folder, path))
        else:
            parts.append(pd.DataFrame(key, points.index).join(points))
    settings = _settings_path(folder, kind)
    if settings.exists() and not made:
        left_out.append(address(folder, settings))
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


@once
def sharpness(folder: Snapshot) -> pd.DataFrame:
    """One row per confirmed run whose sharpness was measured: which run, and `Sharpness.row()`.

    `attrs["left_out"]` lists files that are damaged or of no confirmed run, `attrs["outdated"]` those that were
    measured by an older rule.
    """
    known = keys_of_confirmed_runs(folder)
    rows, left_out, outdated = [], [], []
    for path, measured in _sharpness_files(folder):
        key = known.get((path.parent.name, path.name.removesuffix(".json")))
        if measured == "outdated":
            outdated.append(address(folder, path))
        elif key is None or measured is None:
            left_out.append(address(folder, path))
        else:
            rows.append(key | measured.row())
    frame = frame_of(rows, CONFIRMED_KEY, [])
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


NOISE = [
    "batches", "trace", "trace_error", "squared_norm", "squared_norm_error", "scale", "scale_error",
]  # fmt: skip


@once
def noise(folder: Snapshot) -> pd.DataFrame:
    """One row per model of a confirmed run whose gradient noise was measured, per `mini_batch` size and with
    (`smoothed`) or without the run's smoothing: which run, the `epoch` after which it had the model, and NOISE (see
    `noise.Noise`). `attrs["left_out"]` lists files that are damaged, or of no confirmed run.
    """
    known = keys_of_confirmed_runs(folder)
    rows, left_out = [], []
    paths: list[StoragePath] = sorted((folder.path / "noise").glob("*/*/*.json"))
    for path, text in zip(paths, storage.read_all(paths), strict=True):
        key, found = known.get((path.parent.parent.name, path.parent.name)), _parse(text)
        try:
            measured = [
                {"epoch": int(path.name.partition(".")[0]), "smoothed": bool(row["smoothed"])}
                | {"mini_batch": int(row["batch_size"])}
                | {name: float(row[name]) for name in NOISE}
                for row in found
            ]
        except (KeyError, TypeError, ValueError):  # whatever a file may hold instead
            measured = []
        if key is None or not measured:
            left_out.append(address(folder, path))
        else:
            rows += [key | row for row in measured]
    columns = [*CONFIRMED_KEY, "epoch", "smoothed", "mini_batch", *NOISE]
    frame = frame_of(rows, columns, NOISE)
    frame.attrs["left_out"] = left_out
    return frame


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
