"""What a study keeps of a trial beside its series: how it was run, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypedDict

from lbstudy.study.objective import sort_key
from lbstudy.study.spec import StudySpec

Status = Literal["running", "completed", "pruned", "diverged", "failed"]
FINISHED: tuple[Status, ...] = ("completed", "pruned", "diverged", "failed")


class Move(TypedDict):
    """A node went and the trial with it: no failure of the trial's."""

    at: str  # ISO 8601, UTC
    gone: list[str]  # host names
    epochs: int  # that it had trained since its checkpoint, and trains again
    seconds: float  # of these, and from the last report until the loss was noticed


@dataclass
class TrialRecord:
    """One trial: what was run, how it ended, and its last epoch's metrics."""

    cell: str
    number: int  # counted from 0 within the cell
    optimizer: str
    batch_size: int
    smoothing: str
    params: dict[str, float]  # the tuned values
    seed: int
    run: dict[str, Any]  # the whole RunSpec: with it anyone can repeat the trial
    published: bool = False  # a configuration from the literature, not the sampler's
    status: Status = "running"
    promoted: bool = False  # pruned once, then trained to its end, since no trial of its cell had completed
    started: str = ""  # ISO 8601, UTC
    seconds: float = 0.0  # training and validation, without waiting
    device: str = ""
    workers: list[int] = field(default_factory=list)  # that trained it; two numbers where it went on with another one
    memory: int = 0  # bytes; the most that the process of its first worker has had, in this trial or one before
    device_memory: int = 0  # bytes; the most that this worker has taken of its GPU
    metrics: dict[str, Any] = field(default_factory=dict)  # the last epoch's report
    fingerprint: str = ""  # of the final model
    nodes: list[str] = field(default_factory=list)  # host names of those that trained it, in the order of their turns
    moves: list[dict[str, Any]] = field(default_factory=list)  # times that a node went under it: see `Move`
    lost: float = 0.0  # seconds of training that were thrown away: by moves, failures and interruptions
    failures: int = 0  # times that it failed or its workers died; it is retried up to `resources.max_failures` times
    error: str = ""  # traceback of the last failure
    trial: int | None = None  # a confirmed run: the tuning trial of its cell whose configuration it repeats
    repeat: int = 0  # a confirmed run: its seed's number; runs of one number share the seed, in all cells
    factors: dict[str, str | int | float | bool] = field(default_factory=dict)  # further ones of its cell, by key
    newer: dict[str, Any] = field(default_factory=dict)  # what a newer version has written beside; stays there

    @classmethod
    def read(cls, content: dict[str, Any]) -> TrialRecord:
        """A record from its JSON.

        Raises:
            TypeError: fields are missing.
        """
        known = _names()
        if content.keys() <= known:
            return cls(**content)
        newer = {name: value for name, value in content.items() if name not in known}
        return cls(**{name: value for name, value in content.items() if name in known}, newer=newer)

    def write(self) -> dict[str, Any]:
        """The record as JSON."""
        content = asdict(self)
        return content | content.pop("newer")

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return int(self.metrics.get("epoch", 0))


@cache
def _names() -> frozenset[str]:
    """What a record may hold, but for what is newer."""
    return frozenset(field.name for field in fields(TrialRecord)) - {"newer"}


def ranked(records: Iterable[TrialRecord], study: StudySpec) -> list[TrialRecord]:
    """The completed ones of a cell's trials, best first by the study's metric; the earlier one where two are equal."""
    completed = [record for record in records if record.status == "completed"]
    return sorted(completed, key=lambda record: (sort_key(study.tuning, record.metrics), record.number))
