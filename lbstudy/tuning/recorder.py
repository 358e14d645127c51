"""The records of a running study: what Tune tells is written down, and what was written down is taken up again.

The driver alone writes. Checkpoints and models reach it through the object store, so workers need no access to the
study's folder.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import ray
from ray import tune

from lbstudy.methods.configure import run_spec
from lbstudy.records.checksum import Damaged
from lbstudy.records.folder import Series, StudyFolder, model_name, set_aside
from lbstudy.records.provenance import utc_now
from lbstudy.records.trial import FINISHED, Move, TrialRecord
from lbstudy.storage import locate
from lbstudy.study.objective import objective, sort_key, time_so_far
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.tuning.pruner import StudyPruner
from lbstudy.tuning.search import Past

TRAJECTORY = 20
FETCH_SECONDS = 120.0
MOVED, WAITS, BROKEN = "moved", "waits", "broken"
"""What a lane's trial has ended of, if not by itself: a node went; no resources; the worker group cannot come up."""


def take_up(
    folder: StudyFolder, study: StudySpec, notice: Callable[[str], None]
) -> tuple[list[Past], list[TrialRecord]]:
    """What a study's folder holds, made sound: damaged files are set aside, and the series of interrupted trials are
    cut back to their checkpoints, from which they will go on.

    Args:
        folder: the study's folder.
        study: the study.
        notice: is told of what was set aside and of interrupted trials.

    Returns:
        The trials, as the search wants them and as records.
    """
    cells = {cell.name: cell for cell in study.list_cells()}
    records, damaged = folder.scan()
    for path in damaged:
        notice(f"{path} is damaged; set aside as {set_aside(path).name}. A trial without a record is run again")
    records = [r for r in records if r.cell in cells and r.number < study.tuning.trials]
    if others := sorted({number for r in records for number in r.workers} - {study.resources.workers}):
        notice(
            f"trials here were trained by {' and '.join(map(str, others))} workers, what follows will be by "
            f"{study.resources.workers}: the same but for the rounding of sums, which training amplifies"
        )
    if newer := sorted({name for record in records for name in record.newer}):
        notice(f"a newer version of lbstudy has written records here: what it knows of them ({', '.join(newer)}) stays")
    past = []
    for record in records:
        series = folder.epochs(record)
        if record.status in FINISHED and len(series) < record.epochs:
            notice(f"{folder.trial_folder(record)}: the series of epochs is damaged; the trial will be run again")
            record.status = "running"
            folder.write_trial(record)
        if record.trial is not None and record.status == "completed" and not _model_is_sound(folder, record, notice):
            record.status = "running"
            folder.write_trial(record)
        if record.status not in FINISHED:
            kept = (_checkpoint(folder, record, notice) or (0, b""))[0]
            notice(f"{record.cell} trial {record.number} was interrupted; it goes on after epoch {kept}")
            series = _cut_back(folder, record, kept)
        values = _values(study, record, series)
        elapsed = time_so_far(study.tuning, series[-1]) if series else None
        known = (record.number, record.params, record.status, tuple(values), elapsed, record.published, record.promoted)
        past.append(Past(cells[record.cell], *known))
    return past, records


def _model_is_sound(folder: StudyFolder, record: TrialRecord, notice: Callable[[str], None]) -> bool:
    """Whether the final model of a confirmed run, where it is there, is what was written."""
    try:
        folder.read_state(record, "model")
    except Damaged as error:
        notice(f"{error} is damaged; set aside as {set_aside(locate(str(error))).name}, and its run is made again")
        return False
    return True


def _checkpoint(
    folder: StudyFolder, record: TrialRecord, notice: Callable[[str], None] = lambda message: None
) -> tuple[int, bytes] | None:
    """The trial's checkpoint and its epoch, if the series reaches as far; a damaged one is set aside."""
    try:
        found = folder.read_state(record, "checkpoint")
    except Damaged as error:
        notice(f"{error} is damaged; set aside as {set_aside(locate(str(error))).name}, its epochs will be redone")
        return None
    return found if found and found[0] <= len(folder.epochs(record)) else None


def _cut_back(folder: StudyFolder, record: TrialRecord, kept: int) -> list[dict[str, Any]]:
    """Reduce a trial to its first `kept` epochs."""
    record.lost += sum(entry["seconds"] for entry in folder.epochs(record)[kept:])
    folder.keep_epochs(record, kept)
    series = folder.epochs(record)
    record.metrics = _at_its_end(series[-1]) if series else {}
    record.workers = record.workers if series else []
    record.seconds = sum(entry["seconds"] for entry in series)
    return series


def _values(study: StudySpec, record: TrialRecord, series: list[dict[str, Any]]) -> list[float]:
    """The objective after each epoch."""
    values = [objective(study.tuning, entry, None) for entry in series[:-1]]
    if series:
        outcome = record.status if record.status in FINISHED else None
        values.append(objective(study.tuning, series[-1], outcome))
    return values


TOLD = ("report", "checkpoint", "kept", "model", "best", "config")  # of a result, of no use once it is recorded

NewRecord = Callable[[Cell, int, dict[str, float], bool], TrialRecord]
"""Makes a trial's record of its cell, number, tuned values and whether these were published."""


def tuning_record(study: StudySpec, cell: Cell, number: int, params: dict[str, float], published: bool) -> TrialRecord:
    """The record of a tuning trial that begins."""
    seed = study.trial_seed(cell, number)
    run = run_spec(study, cell, params, seed).model_dump(mode="json")
    return TrialRecord(
        cell.name, number, cell.optimizer, cell.batch_size, cell.smoothing, params, seed, run, published,
        factors=dict(cell.factors),
    )  # fmt: skip


def trajectory(epochs: int) -> list[int]:
    """The epochs after which a confirmed run keeps its model: at most TRAJECTORY, evenly spread. The last one's model
    is kept in any case."""
    return sorted({round(epochs * k / TRAJECTORY) for k in range(1, TRAJECTORY)} - {0, epochs})


class Ranking(NamedTuple):
    """The completed trials of a cell."""

    ranks: list[tuple[float, int]]  # best first: what they are ranked by, and their numbers
    kept: set[int]  # numbers of those that have a model in the folder


class Recorder(tune.Callback):
    """Writes what Tune tells into the study's records, and shows it.

    Args:
        folder: the study's folder.
        study: the study.
        epochs: of a whole run, by cell name.
        records: the trials that the folder holds.
        show: is told of every change of a trial.
        new_record: makes the record of a trial that begins; default: of a tuning trial.
    """

    def __init__(
        self,
        folder: StudyFolder,
        study: StudySpec,
        epochs: dict[str, int],
        records: Sequence[TrialRecord],
        show: Callable[[TrialRecord], None],
        new_record: NewRecord | None = None,
    ):
        self._folder, self._study, self._epochs, self._show = folder.for_driver(), study, epochs, show
        self._new_record = new_record or partial(tuning_record, study)
        self._known = {(record.cell, record.number): record for record in records}
        self._running: dict[str, TrialRecord] = {}  # by Tune's id
        self._heard: dict[str, float] = {}  # when each was last heard of, by Tune's id and the monotonic clock
        self._not_to_blame: set[str] = set()
        self.avoid: Callable[[], Sequence[str]] = tuple
        self._series: dict[str, Series] = {}  # of those
        self._rankings: dict[str, Ranking] = {}  # by cell; of those in which a trial has completed

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks into a snapshot that nobody reads

    def trials(self) -> list[TrialRecord]:
        """The records of all trials."""
        return list(self._known.values())

    def settle_interrupted(self, past: Sequence[Past], pruner: StudyPruner) -> list[Past]:
        """Enter interrupted trials into the rungs; one whose last kept epoch prunes it, as it was about to be when the
        driver died, is pruned now."""
        settled = []
        for trial in past:
            if trial.status not in FINISHED and pruner.replay(trial):
                record = self._known[trial.cell.name, trial.number]
                record.status = "pruned"
                self._write(record)
                trial = replace(trial, status="pruned")
            settled.append(trial)
        self.settle()
        return settled

    def begin(
        self, trial_id: str, cell: Cell, number: int, params: dict[str, float], published: bool
    ) -> dict[str, Any]:
        """A trial that the search suggests, new or to go on with: its record, and the configuration for its lane."""
        record = self._known.get((cell.name, number))
        checkpoint = None
        if record is None:
            record = self._known[cell.name, number] = self._new_record(cell, number, params, published)
            self._folder.drop_epochs(record)  # they belong to a record that was damaged
        else:
            checkpoint = _checkpoint(self._folder, record)
            _cut_back(self._folder, record, checkpoint[0] if checkpoint else 0)
        self._running[trial_id], self._series[trial_id] = record, self._folder.series(record)
        return {
            "cell": cell.name,
            "number": number,
            "run": record.run,
            "rungs": self._study.verdicts(cell, self._epochs[cell.name]),
            "resume": [ray.put(checkpoint[1])] if checkpoint else [],
            "keep": trajectory(self._epochs[cell.name]) if record.trial is not None and record.repeat == 0 else [],
            "avoid": list(self.avoid()),
            "promoted": record.promoted,
        }

    def try_again(self, trial_id: str) -> bool:
        """Count a failure, unless it is not the trial's, and say whether the trial gets another try."""
        record = self._running[trial_id]
        if trial_id not in self._not_to_blame:
            record.failures += 1
        return record.failures <= self._study.resources.max_failures

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has a lane."""
        record = self._running[trial.trial_id]
        record.started = record.started or utc_now()
        self._write(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The news that the trial has begun, or has failed; or an epoch."""
        record = self._running[trial.trial_id]
        if "nodes" in result:
            if record.nodes[-len(result["nodes"]) :] != result["nodes"]:
                record.nodes += result["nodes"]
            self._write(record)
        elif result.get("outcome") == "failed":
            self._note_failure(record, trial.trial_id, result)
        else:
            self._record(record, trial.trial_id, result)
        self._heard[trial.trial_id] = time.monotonic()
        for name in TOLD:  # Tune keeps each trial's last result, and would keep the models in the object store with it
            result.pop(name, None)

    def _note_failure(self, record: TrialRecord, trial_id: str, result: dict[str, Any]) -> None:
        record.error = result["report"]["error"]
        if result.get("lane"):
            self._not_to_blame.add(trial_id)
        if result.get("lane") == MOVED:
            kept = (_checkpoint(self._folder, record) or (0, b""))[0]
            unheard = time.monotonic() - self._heard[trial_id] if trial_id in self._heard else 0.0
            record.lost += unheard  # what its epochs took counts when they are cut back
            again = sum(entry["seconds"] for entry in self._folder.epochs(record)[kept:])
            record.moves.append(
                dict(Move(at=utc_now(), gone=result["gone"], epochs=record.epochs - kept, seconds=again + unheard))
            )

    def _record(self, record: TrialRecord, trial_id: str, result: dict[str, Any]) -> None:
        report = dict(result["report"])
        record.status = result.get("outcome", "running")
        record.device = result["device"]
        record.memory = max(record.memory, result["memory"])
        record.device_memory = max(record.device_memory, result["device_memory"])
        if record.workers[-1:] != [result["workers"]]:
            record.workers.append(result["workers"])
        record.fingerprint = report.pop("fingerprint", "")
        series_entry = _without_infinities(report)
        if "within" in report:
            series_entry["within"] = list(map(_without_infinities, report["within"]))
        record.metrics = _at_its_end(series_entry)
        record.seconds += report["seconds"]
        self._series[trial_id].add(series_entry)
        if record.status == "running":
            self._save(record, "checkpoint", result.get("checkpoint"))
            self._save(record, model_name(record.epochs), result.get("kept"))
            self._show(record)
        elif record.status == "completed":
            self._save_model(record, result)
            self._save(record, "best", result.get("best"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended by itself, or the pruner ended it, or it has failed."""
        failed = (trial.last_result or {}).get("outcome") == "failed"
        self._end(trial.trial_id, failed)
        _lighten(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's lane has died."""
        error_file = Path(trial.error_file) if trial.error_file else None
        text = error_file.read_text() if error_file and error_file.exists() else "the lane has died"
        self._running[trial.trial_id].error = text
        self._end(trial.trial_id, failed=True)
        _lighten(trial)

    def write_running(self) -> None:
        """Bring the records of running trials up to date with their series: the driver ends now."""
        for record in self._running.values():
            self._write(record)

    def settle(self) -> None:
        """Wait until all that was told is written.

        Raises:
            OSError: it cannot be.
        """
        self._folder.settle()

    def _end(self, trial_id: str, failed: bool) -> None:
        record = self._running.pop(trial_id)
        del self._series[trial_id]
        self._not_to_blame.discard(trial_id)
        self._heard.pop(trial_id, None)
        if failed:
            again = record.failures <= self._study.resources.max_failures
            record.status = "running" if again else "failed"
        elif record.status == "running":
            record.status = "pruned"
        self._write(record)
        if record.status in FINISHED:
            self._folder.drop_state(record, "checkpoint")

    def _save(self, record: TrialRecord, name: str, reference: Sequence[ray.ObjectRef] | None) -> None:
        state = _fetch(reference)
        if state is not None:
            self._folder.write_state(record, name, record.epochs, state)

    def _save_model(self, record: TrialRecord, result: dict[str, Any]) -> None:
        """Keep the final model if it is among the cell's best, and let go of those that no longer are."""
        if record.cell not in self._rankings:
            rivals = [r for r in self._known.values() if r.cell == record.cell and r is not record]
            ranks = sorted(self._rank(rival) for rival in rivals if rival.status == "completed")
            self._rankings[record.cell] = Ranking(ranks, self._folder.with_state(record.cell, "model"))
        ranks, kept = self._rankings[record.cell]
        insort(ranks, self._rank(record))
        best = {number for _, number in ranks[: self._study.resources.keep_best]}
        if record.number in best:
            self._save(record, "model", result.get("model"))
            kept.add(record.number)
        for number in kept - best:
            if (beaten := self._known.get((record.cell, number))) is not None:
                self._folder.drop_state(beaten, "model", behind=record)
        kept &= best

    def _rank(self, record: TrialRecord) -> tuple[float, int]:
        """What a completed trial is ranked by among those of its cell; see `folder.ranked`."""
        return sort_key(self._study.tuning, record.metrics), record.number

    def _write(self, record: TrialRecord) -> None:
        self._folder.write_trial(record)
        if record.status in FINISHED:  # it is safe when it is said
            self._folder.after(record, partial(self._show, record))
        else:
            self._show(record)


def _lighten(trial: Any) -> None:
    """Tune keeps every trial that has ended, with averages of every number that it was told and two copies of all that
    its lane was: the driver's memory would grow by them. What a trial was is in the records."""
    trial.metric_analysis.clear()
    trial.metric_n_steps.clear()
    trial.config, trial.evaluated_params = {}, {}


def _at_its_end(report: dict[str, Any]) -> dict[str, Any]:
    """An epoch's report without the evaluations within it."""
    return {name: value for name, value in report.items() if name != "within"}


def _without_infinities(numbers: dict[str, Any]) -> dict[str, Any]:
    """JSON has none, nor NaN."""
    return {n: value if math.isfinite(value) else None for n, value in numbers.items() if n != "within"}


def _fetch(reference: Sequence[ray.ObjectRef] | None) -> bytes | None:
    """The bytes that a worker has put into the object store; None where it put none, or died too soon, or where they do
    not come."""
    if not reference:
        return None
    try:
        return ray.get(reference[0], timeout=FETCH_SECONDS)
    except ray.exceptions.RayError:
        return None
