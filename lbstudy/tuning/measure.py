"""What a study's runs cost here, measured: one of each kind for an epoch or two, through the same lanes as its trials.

Runs are of one kind where they differ in nothing that changes the time of an epoch (`kind`). Lanes are warm and all of
them at work while a run is measured: each begins with a run that does not count, and when no more are waiting to be
measured, further ones of the shortest kind keep the others company. The records lie in a folder of their own, which is
thrown away. `forecast` makes of it what a study costs.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean, median
from typing import Any, Literal

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from lbstudy.methods.configure import run_spec
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.scratch import scratch_folder
from lbstudy.study.run import Extent
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.training.datasets import source, training_samples
from lbstudy.tuning.recorder import Recorder, tuning_record
from lbstudy.tuning.search import QueuedTrial, TrialQueue
from lbstudy.tuning.tuner import Plan, fit_runs

EPOCHS = 2
SECONDS = 2.0
"""A run is measured for EPOCHS epochs at least, and until those after the first have taken SECONDS."""

FREE = ("seed", "split_seed", "schedule", "budget", "weight_decay_of", "train_on", "evaluate")
"""What of a run changes no epoch's time, or is measured apart."""

Role = Literal["warming", "measured", "tested", "company"]
"""What a run is there for: to warm its lane up; to be measured; to be measured as a confirmed run, which evaluates the
training images and the test set too; or to keep a lane busy."""


@dataclass(frozen=True)
class Cost:
    """What the runs of a cell cost, in a warm lane while all are at work."""

    measured: str  # name of the cell whose run was measured
    first: float  # seconds of the first epoch, which may hold what happens once: compilation, choice of kernels
    epoch: float  # seconds of a later epoch, training and validation
    confirmed: float  # seconds of an epoch of a confirmed run, which evaluates on all images
    images_per_second: float  # in training
    device_memory: int  # bytes of a worker's GPU


@dataclass(frozen=True)
class Measured:
    """What was measured."""

    costs: dict[str, Cost]  # by cell, for those whose run has not failed
    failed: dict[str, str]  # cell -> why its run has failed
    starting: float  # seconds until a lane is up and its first trial begins
    between: float  # seconds from one trial's begin in a warm lane to that of its first epoch
    memory: int  # bytes; the most that a worker's process has had
    device: str  # of a trial
    seconds: float  # that it took


def kind(study: StudySpec, cell: Cell) -> str:
    """Equal for cells whose runs cost the same: they differ at most in FREE and in decimal hyper-parameters."""
    run = run_spec(study, cell, gentle_values(study, cell), seed=0).model_dump(mode="json", exclude=set(FREE))
    run["hyper"] = {name: None if isinstance(value, float) else value for name, value in run["hyper"].items()}
    return json.dumps(run, sort_keys=True)


def kinds(study: StudySpec) -> list[list[Cell]]:
    """The cells by kind."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in study.list_cells():
        found[kind(study, cell)].append(cell)
    return list(found.values())


def gentle_values(study: StudySpec, cell: Cell) -> dict[str, float]:
    """Values of a cell's search with which a run is not likely to diverge: the least learning rate, else the middle."""
    ranges = study.ranges(cell)
    return {name: entry.bounds[0] if name == "learning_rate" else entry.middle for name, entry in ranges.items()}


def measure(
    plan: Plan,
    began: float,
    show: Callable[[], None] = lambda: None,
    notice: Callable[[str], None] = lambda sentence: None,
    verbose: bool = False,
) -> Measured:
    """Measure what the runs of a study cost on the connected Ray.

    Args:
        plan: the study, checked.
        began: when the start of Ray began, by `time.monotonic`.
        show: is told of every kind of runs that has been measured.
        notice: is told what a user should know.
        verbose: let Tune print.
    """
    study = measurable(plan.study)
    with scratch_folder("measure") as scratch:
        folder = StudyFolder(scratch)
        course = Course(replace(plan, study=study), show)
        recorder = Recorder(folder, study, plan.epochs, [], course.shown, course.new_record)
        queue = MeasuredRuns(study, course, recorder)
        as_planned = replace(plan, study=study, work=plan.lanes)
        fit_runs(as_planned, queue, Stopwatch(course), recorder, notice, verbose)
        return course.result(began, folder)


def measurable(study: StudySpec) -> StudySpec:
    """The study as its runs are measured: none is tried again, no model is kept, and where the target is not known yet
    accuracy is in its place."""
    resources = study.resources.model_copy(update={"max_failures": 0, "keep_best": 0})
    open_target = {"metric": "val_accuracy", "direction": "maximize", "target": None}
    tuning = study.tuning.model_copy(update=open_target if study.tuning.target == "auto" else {})
    return study.model_copy(update={"resources": resources, "tuning": tuning})


class Course:
    """Which runs there are, what each is there for, and how far they have come. A run is its cell's name and a number.

    Args:
        plan: the study.
        show: see `measure`.
    """

    def __init__(self, plan: Plan, show: Callable[[], None]):
        self._study, self._plan, self._show = plan.study, plan, show
        self.rungs = range(1, max(plan.epochs.values()))
        self._kinds = kinds(plan.study)
        first = [cells[0] for cells in self._kinds]
        self._tested = {_evaluation(plan.study, cell): cell for cell in reversed(first)}  # one for each way to evaluate
        self.roles: dict[tuple[str, int], Role] = {}
        self._numbers: dict[str, int] = defaultdict(int)  # of runs, by cell
        self._seen: dict[tuple[str, int], list[float]] = defaultdict(list)  # seconds of each epoch so far
        self._suggested: dict[tuple[str, int], float] = {}
        self._first_report: dict[tuple[str, int], float] = {}
        self.waiting = [self._new(first[n % len(first)], "warming") for n in range(plan.lanes)]
        self.waiting += [self._new(cell, "measured") for cell in first]
        self.waiting += [self._new(cell, "tested") for cell in self._tested.values()]
        self._left = {run for run, role in self.roles.items() if role in ("measured", "tested")}

    def _new(self, cell: Cell, role: Role) -> QueuedTrial:
        number = self._numbers[cell.name]
        self._numbers[cell.name] += 1
        self.roles[cell.name, number] = role
        return cell, number, gentle_values(self._study, cell), False

    def company(self) -> QueuedTrial | None:
        """A run that keeps a lane busy while others are measured, of the kind whose epochs are the shortest as far as
        is known; None when all have been."""
        if not self._left:
            return None
        seen: dict[str, list[float]] = defaultdict(list)
        for (name, _), seconds in self._seen.items():
            seen[name] += seconds
        first = [cells[0] for cells in self._kinds]
        return self._new(min(first, key=lambda cell: fmean(seen[cell.name] or [inf])), "company")

    def new_record(self, cell: Cell, number: int, params: dict[str, float], published: bool) -> TrialRecord:
        """The record of a run that begins."""
        record = tuning_record(self._study, cell, number, params, published)
        if self.roles[cell.name, number] == "tested":
            record.run["evaluate"] = "all"
        return record

    def suggested(self, cell: str, number: int) -> None:
        """A lane is to take a run."""
        self._suggested[cell, number] = time.monotonic()

    def shown(self, record: TrialRecord) -> None:
        """A run has begun, reported or ended."""
        if record.epochs:
            self._first_report.setdefault((record.cell, record.number), time.monotonic())

    def goes_on(self, cell: str, number: int, seconds: float) -> bool:
        """A run has ended an epoch; whether it goes on with the next."""
        run = (cell, number)
        self._first_report.setdefault(run, time.monotonic())
        self._seen[run].append(seconds)
        if not self._left:
            return False
        if self.roles[run] == "warming":
            return sum(self.roles[other] == "warming" for other in self._first_report) < self._plan.lanes
        return len(self._seen[run]) < EPOCHS or sum(self._seen[run][1:]) < SECONDS

    def ended(self, cell: str, number: int) -> None:
        """A run has ended, in whichever way."""
        self._left.discard((cell, number))
        if self.roles[cell, number] == "measured":
            self._show()

    def result(self, began: float, folder: StudyFolder) -> Measured:
        """What has been measured, of the records in a folder."""
        records = {(record.cell, record.number): record for record in folder.trials()}
        series = {run: folder.epochs(record) for run, record in records.items()}
        chosen = {(run[0], role): run for run, role in self.roles.items() if role in ("measured", "tested")}
        more: dict[str, float] = {}  # seconds that the evaluation of a confirmed run takes more
        for way, cell in self._tested.items():
            plain, tested = (series.get(chosen[cell.name, role], []) for role in ("measured", "tested"))
            if plain and tested:
                samples = extent_of(self._plan, cell).images_per_pass
                more[way] = max(0.0, _evaluating(tested, samples) - _evaluating(plain, samples))
        costs: dict[str, Cost] = {}
        failed: dict[str, str] = {}
        for cells in self._kinds:
            run = chosen[cells[0].name, "measured"]
            record, seconds = records[run], [entry["seconds"] for entry in series[run]]
            if record.status == "failed" or not seconds:
                failed |= dict.fromkeys((cell.name for cell in cells), record.error)
                continue
            later = fmean(seconds[1:] or seconds)
            confirmed = later + more.get(_evaluation(self._study, cells[0]), 0.0)
            speed = float(series[run][-1]["images_per_second"])
            cost = Cost(run[0], max(seconds[0], later), later, confirmed, speed, record.device_memory)
            costs |= {cell.name: cost for cell in cells}
        waits: dict[bool, list[float]] = {True: [], False: []}  # seconds before the first epoch; True: of a cold lane
        for run, at in self._first_report.items():
            cold = self.roles[run] == "warming"
            waits[cold].append(at - (began if cold else self._suggested[run]) - series[run][0]["seconds"])
        return Measured(
            costs,
            failed,
            starting=max(0.0, fmean(waits[True] or [0.0])),
            between=max(0.0, median(waits[False] or [0.0])),
            memory=max((record.memory for record in records.values()), default=0),
            device=next((record.device for record in records.values() if record.device), ""),
            seconds=time.monotonic() - began,
        )


def _evaluation(study: StudySpec, cell: Cell) -> str:
    """Equal for cells whose models take the same time to evaluate: model, data and precision are theirs."""
    run = run_spec(study, cell, gentle_values(study, cell), seed=0)
    return run.model_dump_json(include={"model", "dataset", "precision", "compile"})


def extent_of(plan: Plan, cell: Cell) -> Extent:
    """How long a whole run of a cell is."""
    part = plan.study.variant(cell)
    return part.extent(cell, training_samples(part.dataset, plan.data[source(part.dataset)]))


def _evaluating(series: Sequence[dict[str, Any]], samples: int) -> float:
    """Seconds of an epoch of so many training samples that are not training, in the series of a run."""
    return median(entry["seconds"] - samples / entry["images_per_second"] for entry in series[1:] or series)


class MeasuredRuns(TrialQueue):
    """Hands out the runs of a course."""

    def __init__(self, study: StudySpec, course: Course, recorder: Recorder):
        self._course, self._recorder = course, recorder
        super().__init__(study, course.waiting, self._begin_run, recorder.try_again)

    def _begin_run(self, trial_id: str, cell: Cell, number: int, *values: Any) -> dict[str, Any]:
        """A run that may be ended after each of its epochs, and does not end by itself at a target."""
        self._course.suggested(cell.name, number)
        begun = self._recorder.begin(trial_id, cell, number, *values)
        return begun | {"rungs": self._course.rungs, "run": begun["run"] | {"until_target": False}}

    def _new_trial(self) -> QueuedTrial | None:
        return self._course.company()

    def _ended(self, trial: QueuedTrial, result: dict[str, Any] | None) -> None:
        cell, number, *_ = trial
        self._course.ended(cell.name, number)


class Stopwatch(FIFOScheduler):
    """Tells a course of each epoch, and ends its runs."""

    def __init__(self, course: Course):
        super().__init__()
        self._course = course

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it into a snapshot that nobody reads

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """It needs neither."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a run goes on after this epoch."""
        if "epoch" not in result:  # the news that the run has begun
            return TrialScheduler.CONTINUE
        going = self._course.goes_on(trial.config["cell"], trial.config["number"], result["report/seconds"])
        return TrialScheduler.CONTINUE if going else TrialScheduler.STOP
