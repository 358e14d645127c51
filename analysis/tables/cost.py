"""How a study stands: what is running, how fast, what is left, and what it has cost so far. From its records alone.

A running trial's record is written when it begins, and its series grows: what it has done is read there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isnan, nan
from statistics import fmean
from typing import NamedTuple

from lbstudy.analysis import load
from lbstudy.analysis.stats import written
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import is_held
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.study.spec import Resources, StudySpec

SHOWN = 8
"""Running trials that are named."""


class Running(NamedTuple):
    """A trial or a confirmed run at work."""

    record: TrialRecord
    epochs: float  # of a whole run, as far as is known; else NaN
    seconds: float  # of its last epoch; NaN where none has ended
    images_per_second: float


@dataclass(frozen=True)
class Spent:
    """What trials and confirmed runs have cost."""

    trials: int
    confirmed: int
    seconds: float  # of training and evaluation
    devices: dict[str, float]  # seconds of a device, by kind: `CPU`, or a GPU's name
    lost: dict[str, float]  # likewise, of training that was thrown away and is not in the above
    moves: int  # times that a node went under a trial
    images: int  # that went through training, each as often as it did


@dataclass(frozen=True)
class Standing:
    """How a study stands."""

    study: StudySpec
    at_work: bool  # whether a driver is
    ended: int  # trials
    wanted: int  # trials
    running: list[Running]  # trials and confirmed runs
    left: float | None  # seconds of training until all trials have ended; None where nothing tells
    spent: Spent

    @property
    def complete(self) -> bool:
        """Whether all trials have ended and nothing is at work, a confirmation for example."""
        return self.ended >= self.wanted and not self.at_work


def standing(folder: StudyFolder) -> Standing:
    """How the study in a folder stands."""
    study, at_work = folder.study(), is_held(folder.path)
    trials, confirmed = (_up_to_date(part) for part in (folder, folder.confirmation))
    both = [*trials, *confirmed]
    running = [_running(record) for record in both if record.status == "running"] if at_work else []
    return Standing(
        study,
        at_work,
        ended=sum(record.status in FINISHED for record in trials),
        wanted=study.tuning.trials * len(study.list_cells()),
        running=running,
        left=seconds_left(study, trials),
        spent=Spent(
            len(trials),
            len(confirmed),
            sum(record.seconds for record in both),
            device_seconds(both, study.resources),
            device_seconds((replace(record, seconds=record.lost) for record in both if record.lost), study.resources),
            sum(len(record.moves) for record in both),
            images_seen(both),
        ),
    )


def _up_to_date(folder: StudyFolder) -> list[TrialRecord]:
    """A folder's records, those of running trials with what their series say."""
    found = []
    for record in load.records(folder).sound:
        if record.status == "running":
            series = folder.epochs(record)
            seconds = sum(entry["seconds"] for entry in series)
            record = replace(record, metrics=series[-1] if series else {}, seconds=seconds)
        found.append(record)
    return found


def whole_epochs(record: TrialRecord) -> float:
    """Epochs of a whole run; NaN while a budget in steps does not tell yet."""
    budget, step = record.run.get("budget", {}), record.metrics.get("step")
    if budget.get("epochs") and not budget.get("updates_of"):
        return float(budget["epochs"])
    return budget["steps"] * record.epochs / step if step and budget.get("steps") else nan


def _running(record: TrialRecord) -> Running:
    speeds = (record.metrics.get(name) for name in ("seconds", "images_per_second"))
    return Running(record, whole_epochs(record), *(nan if speed is None else speed for speed in speeds))


def seconds_left(study: StudySpec, trials: Sequence[TrialRecord]) -> float | None:
    """Seconds of training until all trials of a study have ended, if each takes what those of its cell have taken so
    far on average, pruned ones included; where none of a cell has ended, what those of all cells have. None where no
    trial has ended."""
    ended: dict[str, list[float]] = defaultdict(list)
    begun: dict[str, list[float]] = defaultdict(list)
    for record in trials:
        kind = ended if record.status in FINISHED else begun
        kind[record.cell].append(record.seconds)
    if not ended:
        return None
    everywhere = fmean(fmean(seconds) for seconds in ended.values())
    left = 0.0
    for cell in study.list_cells():
        each = fmean(ended[cell.name]) if ended[cell.name] else everywhere
        missing = study.tuning.trials - len(ended[cell.name]) - len(begun[cell.name])
        left += max(0, missing) * each + sum(max(0.0, each - seconds) for seconds in begun[cell.name])
    return left


def device_seconds(records: Iterable[TrialRecord], resources: Resources) -> dict[str, float]:
    """Seconds of a device, by its kind. A worker has as many as `resources` say, of GPUs maybe a part of one."""
    found: dict[str, float] = defaultdict(float)
    gpus = 1.0 if resources.gpus_per_worker in ("auto", 0) else float(resources.gpus_per_worker)
    for record in records:
        if record.device:
            workers, _, kind = record.device.rpartition(" x ")  # of one alone if it says nothing else
            share = resources.cpus_per_worker if kind == "cpu" else gpus
            found["CPU" if kind == "cpu" else kind] += record.seconds * int(workers or 1) * share
    return dict(found)


def images_seen(records: Iterable[TrialRecord]) -> int:
    """Training images that went through these runs, each as often as it did. Older records hold steps alone: then whole
    mini-batches are counted."""
    metrics = ((record.batch_size, record.metrics) for record in records)
    return sum(found.get("images", batch_size * found.get("step", 0)) for batch_size, found in metrics)


def progress_sentences(now: Standing) -> list[str]:
    """What is running, how fast, and what is left, in words."""
    tuned, said = now.study.tuning, list[str]()
    metric, word = ("nearest", f"nearest {tuned.goal.metric}") if tuned.goal else (tuned.metric, tuned.metric)
    for record, epochs, *_ in now.running[:SHOWN]:
        kind = f"trial {record.number}" if record.trial is None else f"confirmed run {record.repeat}"
        value = record.metrics.get(metric)
        of = "" if isnan(epochs) else f" of {ceil(epochs)}"
        so_far = f"epoch {record.epochs}{of}" + (f", {word} {value:.4f}" if value is not None else "")
        if not record.epochs:  # records of before say nothing of nodes
            so_far = "in its first epoch" if record.nodes else "waits for its workers to come up"
        where = (
            f" on {' and '.join(record.nodes[-last:])}" if (last := min(len(record.nodes), _workers(record))) else ""
        )
        said.append(f"running: {record.cell} {kind}, {so_far}{where}{_moved(record)}")
    if len(now.running) > SHOWN:
        said.append(f"running: {len(now.running) - SHOWN} more")
    at_speed = [run for run in now.running if not isnan(run.seconds)]
    if at_speed:
        images, epochs = sum(run.images_per_second for run in at_speed), sum(60 / run.seconds for run in at_speed)
        said.append(f"speed: {images:,.0f} images/s and {epochs:.3g} epochs a minute, {len(at_speed)} at work")
    tuning = sum(run.record.trial is None for run in now.running)
    if now.left is not None and now.ended < now.wanted:
        beside = f": about {duration(now.left / tuning)} with {tuning} at a time" if tuning else ""
        said.append(
            f"left: {now.wanted - now.ended} of {now.wanted} trials, {duration(now.left)} of training if they take "
            f"what the others have{beside}"
        )
    return said


def _workers(record: TrialRecord) -> int:
    return record.workers[-1] if record.workers else 1


def _moved(record: TrialRecord) -> str:
    """How often a trial was moved, and what it has cost."""
    if not record.moves:
        return ""
    epochs, seconds = (sum(move[key] for move in record.moves) for key in ("epochs", "seconds"))
    return f", moved {len(record.moves)} times: {epochs} epochs and {duration(seconds)} lost"


def sentences(now: Standing) -> list[str]:
    """How a study stands, in words."""
    said, spent = progress_sentences(now), now.spent
    if spent.trials:
        runs = f"{spent.trials} trials" + (f" and {spent.confirmed} confirmed runs" if spent.confirmed else "")
        said.append(f"so far: {runs}, {hours(spent.devices) or 'no epoch yet'}, {in_words(spent.images)} images seen")
        if spent.lost or spent.moves:
            said.append(lost_in_words(spent))
    if not now.at_work and now.ended < now.wanted:
        said.append("no driver is at work")
    return said


def hours(devices: Mapping[str, float]) -> str:
    """Device time: `1.5 CPU hours`."""
    return ", ".join(f"{written(seconds / 3600, 3)} {kind} hours" for kind, seconds in devices.items())


def lost_in_words(spent: Spent) -> str:
    """What was trained and thrown away, in a sentence."""
    moves = f", and trials were moved {spent.moves} times from a node that went" if spent.moves else ""
    return f"lost: {hours(spent.lost) or 'nothing'} more, trained again after interruptions{moves}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, `1:02:03`; below a minute the seconds alone, `12 s`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def in_words(count: float) -> str:
    """A number of images: `12 thousand`, `3.4 million`."""
    for unit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:.0f}"
