"""What a tracker is told of a trial, made from its record and its series of epochs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any
from uuid import uuid4

from lbstudy import storage
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, Status, TrialRecord
from lbstudy.storage import StoragePath

Key = tuple[str, str, int]
"""Which trial of a study: `trials` or `confirm`, its cell, its number."""

TUNING, CONFIRMED = "trials", "confirm"
FOLDER = "trackers"
IDENTITY = "study.json"


@dataclass(frozen=True)
class Point:
    """An epoch on a trial's curves."""

    epoch: int  # counted from 1
    time: float  # of its end, in seconds since 1970; without the time that the trial has waited
    values: dict[str, float]  # by metric; what is not finite is left out


@dataclass(frozen=True)
class TrackedTrial:
    """A trial as trackers show it."""

    key: Key
    study: str  # its name
    identity: str  # of the study among those of its name
    parameters: dict[str, str | int | float | bool]  # its cell's values, what is tuned, its seed
    points: list[Point]
    status: Status
    began: float  # in seconds since 1970

    @property
    def name(self) -> str:
        """`trials/sgd-b128-none/0007`."""
        kind, cell, number = self.key
        return f"{kind}/{cell}/{number:04d}"

    @property
    def has_ended(self) -> bool:
        """Whether no more epochs will come."""
        return self.status in FINISHED

    @property
    def ended(self) -> float:
        """When its last epoch ended."""
        return self.points[-1].time if self.points else self.began


def tracked(study: str, identity: str, kind: str, record: TrialRecord, series: list[dict[str, Any]]) -> TrackedTrial:
    """A trial from its record and its series, which must have been read after the record."""
    repeats: dict[str, Any] = {} if record.trial is None else {"trial": record.trial, "repeat": record.repeat}
    cell: dict[str, Any] = {name: getattr(record, name) for name in ("optimizer", "batch_size", "smoothing")}
    began = datetime.fromisoformat(record.started).timestamp() if record.started else 0.0
    ends = accumulate((_number(entry.get("seconds")) or 0.0 for entry in series), initial=began)
    points = [
        Point(epoch, end, {name: number for name, v in entry.items() if (number := _number(v)) is not None})
        for epoch, (end, entry) in enumerate(zip(list(ends)[1:], series, strict=True), start=1)
    ]
    parameters: dict[str, Any] = (
        cell | record.factors | record.params | {"seed": record.seed, "published": record.published} | repeats
    )
    key = (kind, record.cell, record.number)
    return TrackedTrial(key, study, identity, parameters, points, record.status, began)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def trackers_folder(folder: StudyFolder) -> StoragePath:
    """Where a study's folder keeps what belongs to its trackers."""
    return folder.path / FOLDER


def identity(folder: StudyFolder) -> str:
    """What tells a study from others of its name, in a tracker that several studies share; made where it is missing."""
    path = trackers_folder(folder) / IDENTITY
    if (content := storage.read(path)) is None:
        content = json.dumps({"id": uuid4().hex}).encode()
        storage.make_folder(path.parent)
        storage.write(path, content)
    return str(json.loads(content)["id"])
