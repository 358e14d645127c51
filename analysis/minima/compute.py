"""What the minima look like: landscapes and sharpness of a study's confirmed runs, computed all over a Ray cluster.

The work is cut into tasks of at most CHUNK points, or one run's sharpness. A task's result is a file in the study's
folder, written as soon as it is there; what has its file is not computed again. `settings.json` beside the files says
what they are, so that anyone can repeat them: directions are a seed and a rule. A process keeps images and network from
one task to the next. This is the only module of `analysis` that starts Ray.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from lbstudy import storage
from lbstudy.analysis import load
from lbstudy.analysis.rules import RULES, OldRule, require_rule
from lbstudy.records.checksum import Damaged
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.file import NothingYet, StudyError
from lbstudy.study.run import RunSpec, Spec
from lbstudy.study.spec import StudySpec
from lbstudy.training.dataset import Dataset
from lbstudy.training.datasets import Datasets, of_run

if TYPE_CHECKING:
    import ray
    import torch
    from torch import nn

    from lbstudy.analysis.minima.landscape import Points
    from lbstudy.study.code import Code
    from lbstudy.training.data import ImageData

Kind = Literal["line", "plane", "interpolate", "trajectory", "sharpness", "noise"]
REMIND_SECONDS = 120.0  # a task that takes so long says so
SETTINGS = "settings.json"
CHUNK = 64  # points of a task: minutes at most, so that little is lost when a node is

Settings = TypeVar("Settings", bound=Spec)


class LandscapeSettings(Spec):
    """How landscapes are computed; of one kind, all that are compared have the same."""

    directions: int = Field(5, gt=0, description="of a line: random directions, the same for every model")
    normalisation: Literal["filter", "layer", "none"] = "filter"
    biases_and_norms: bool = Field(False, description="whether directions move biases and batch-norm parameters")
    samples: int = Field(10_000, gt=0, description="of the training and of the test set, drawn by seed; all if fewer")
    seed: int = Field(0, ge=0, description="of directions and samples")


@dataclass(frozen=True)
class Task:
    """A piece of work on one confirmed run, or on two of them."""

    kind: Kind
    folder: str  # of the results, below the study's folder
    part: int
    run: dict[str, Any]  # the RunSpec of the networks
    states: tuple[tuple[TrialRecord, str], ...]  # of the run, or of the start and the end, or on the way
    settings: dict[str, Any]

    @property
    def result(self) -> str:
        """The file that is there when the work is done."""
        if self.kind == "sharpness":
            return f"{self.folder}.json"
        return f"{self.folder}/{self.part:03d}.{'json' if self.kind == 'noise' else 'csv'}"


def best_runs(folder: StudyFolder, repeats: int | None = None) -> list[TrialRecord]:
    """The completed confirmed runs of each cell's best configuration.

    Args:
        folder: of the study.
        repeats: only the first so many of each cell, those before the others whose models are there.

    Raises:
        NothingYet: there are none.
    """
    table = load.confirmed(folder)
    table = table[(table["status"] == "completed") & (table["rank"] == 0)]
    chosen = set(zip(table["cell"], table["number"], strict=True))
    runs = [run for run in folder.confirmation.trials() if (run.cell, run.number) in chosen]
    if not runs:
        raise NothingYet(
            f"{folder.path}: no confirmed run has completed; begin with lbstudy confirm {quote(str(folder.path))}"
        )
    if repeats is None:
        return runs
    wanted = []
    for cell in dict.fromkeys(run.cell for run in runs):
        there = folder.confirmation.with_state(cell, "model")
        of_cell = sorted(
            (run for run in runs if run.cell == cell), key=lambda run: (run.number not in there, run.repeat)
        )
        wanted += of_cell[:repeats]
    return wanted


def landscape_tasks(
    folder: StudyFolder, kind: Kind, runs: Sequence[TrialRecord], settings: LandscapeSettings
) -> list[Task]:
    """The tasks of all runs' landscapes of a kind.

    Raises:
        NothingYet: interpolation, but no two runs differ in the batch size alone.
    """
    plain = settings.model_dump(mode="json")
    tasks = []
    for states, name in _subjects(folder, kind, runs):
        parts = -(-_count(kind, settings) // CHUNK)
        where = f"landscape/{kind}/{name}"
        tasks += [Task(kind, where, part, states[-1][0].run, states, plain) for part in range(parts)]
    return tasks


def sharpness_tasks(runs: Sequence[TrialRecord], settings: Spec) -> list[Task]:
    """A task per run."""
    plain = settings.model_dump(mode="json")
    return [Task("sharpness", f"sharpness/{_name(run)}", 0, run.run, ((run, "model"),), plain) for run in runs]


def noise_tasks(folder: StudyFolder, runs: Sequence[TrialRecord], settings: Spec) -> list[Task]:
    """A task per run's solution, and per model on the way that it has kept; `part` is the epoch."""
    plain = settings.model_dump(mode="json")
    tasks = []
    for run in runs:
        way = {int(name.removeprefix("epoch-")): name for name in folder.confirmation.models_on_the_way(run)}
        states = {**way, run.epochs: "model"}
        where = f"noise/{_name(run)}"
        tasks += [Task("noise", where, epoch, run.run, ((run, name),), plain) for epoch, name in states.items()]
    return tasks


def _name(run: TrialRecord) -> str:
    return f"{run.cell}/{run.number:04d}"


def _count(kind: Kind, settings: LandscapeSettings) -> int:
    from lbstudy.analysis.minima.landscape import INTERPOLATION, LINE, PLANE

    if kind == "line":
        return len(LINE) * settings.directions
    return len(INTERPOLATION) if kind == "interpolate" else len(PLANE) ** 2


def _subjects(
    folder: StudyFolder, kind: Kind, runs: Sequence[TrialRecord]
) -> Iterator[tuple[tuple[tuple[TrialRecord, str], ...], str]]:
    """Which states each landscape of a kind is about, and its name."""
    if kind == "interpolate":
        yield from _pairs(runs)
        return
    for run in runs:
        way = folder.confirmation.models_on_the_way(run) if kind == "trajectory" else []
        states = tuple((run, name) for name in way)
        if kind != "trajectory" or len(states) >= 2:
            yield (*states, (run, "model")), _name(run)


def _pairs(runs: Sequence[TrialRecord]) -> Iterator[tuple[tuple[tuple[TrialRecord, str], ...], str]]:
    """From the solution of the smallest batch to that of each larger one, with the same seed and all else alike."""
    found = False
    for end in runs:
        alike = [run for run in runs if _but_for_the_batch_size(run) == _but_for_the_batch_size(end)]
        start = min(alike, key=lambda run: run.batch_size)
        if start.batch_size < end.batch_size:
            found = True
            yield ((start, "model"), (end, "model")), _name(end)
    if not found:
        raise NothingYet("interpolation needs confirmed runs that differ in the batch size alone, and there are none")


def _but_for_the_batch_size(run: TrialRecord) -> tuple[object, ...]:
    """What two runs share between whose solutions a line is drawn."""
    return run.optimizer, run.smoothing, run.repeat, run.factors


def kept_settings(folder: StudyFolder, where: str, otherwise: Settings) -> Settings:
    """What the results in a folder are made with; other settings where there are none.

    Raises:
        StudyError: they are made by an older rule.
    """
    kept = _made_with(folder.path / where / SETTINGS)
    if kept is None:
        return otherwise
    return type(otherwise).model_validate({name: value for name, value in kept.items() if name != "rule"})


def _made_with(path: storage.StoragePath) -> dict[str, Any] | None:
    """What stands in a file of settings, unless it is of work that came to no result.

    Raises:
        StudyError: the results beside it are made by an older rule.
    """
    content = storage.read(path) if any(path.parent.glob("*/*")) else None
    if content is None:
        return None
    found: dict[str, Any] = json.loads(content)
    try:
        require_rule(path.parent.name, found)
    except OldRule as error:
        raise StudyError(f"{path.parent} holds results {error}. Remove the folder, and run this again") from error
    return found


def keep_settings(folder: StudyFolder, where: str, settings: Spec) -> None:
    """Write down what the results in a folder are made with, and by which rule where it is not the first.

    Raises:
        StudyError: it holds results made with other settings, or by an older rule.
    """
    path, kind = folder.path / where / SETTINGS, where.rpartition("/")[2]
    mine = settings.model_dump(mode="json") | ({"rule": RULES[kind]} if kind in RULES else {})
    theirs = _made_with(path)
    if theirs is not None and theirs != mine:
        other = ", ".join(f"{key} {theirs.get(key)} (now {new})" for key, new in mine.items() if theirs.get(key) != new)
        raise StudyError(f"{path.parent} holds results with {other}; remove the folder, or keep to the former")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, json.dumps(mine, indent=2).encode())


def missing(folder: StudyFolder, tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose results are not there yet."""
    return [task for task in tasks if not (folder.path / task.result).exists()]


def compute(
    folder: StudyFolder,
    study: StudySpec,
    data: Datasets,
    tasks: Sequence[Task],
    done: Callable[[Task], None],
    failed: Callable[[Task, str], None],
    notice: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Compute tasks on the connected Ray and write down their results as they come.

    Args:
        folder: of the study.
        study: the study, for the resources of a worker: a task takes what one worker of a trial does.
        data: the study's.
        tasks: what to compute.
        done: is told of each result.
        failed: is told of each task that raised, and why.
        notice: is told what tasks wait for.

    Raises:
        StudyError: for `resources.timeout_minutes` there was no result.
    """
    import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

    import ray

    from lbstudy.methods.user_code import active
    from lbstudy.tuning.resources import with_gpus
    from lbstudy.tuning.tuner import cluster_nodes

    resources = with_gpus(study.resources, cluster_nodes())
    remote = ray.remote(_compute).options(
        num_cpus=resources.cpus_per_worker, num_gpus=float(resources.gpus_per_worker), max_retries=3
    )
    images = {name: ray.put(dataset) for name, dataset in data.items()}
    code, states = ray.put(active()), _States(folder.confirmation)
    waiting: dict[ray.ObjectRef, Task] = {}
    for task in tasks:
        try:
            of_states = [states.get(*state) for state in task.states]
        except StudyError as error:  # the others need not suffer from it
            failed(task, str(error))
            continue
        of_task = of_run(images, RunSpec.model_validate(task.run).dataset)
        waiting[remote.remote(task.kind, task.run, task.settings, task.part, of_task, code, *of_states)] = task
    for task, answer in _as_they_come(waiting, resources.timeout_minutes, notice):
        try:
            files = ray.get(answer)
        except ray.exceptions.RayError as error:
            failed(task, str(error).strip().splitlines()[-1])
            continue
        target = folder.path / task.result
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            storage.write(target.parent / name if name else target, content)
        done(task)


class _States:
    """States of confirmed runs, each in Ray's object store once, however many tasks want it."""

    def __init__(self, confirmation: StudyFolder):
        self._confirmation = confirmation
        self._there: dict[tuple[str, str], ray.ObjectRef] = {}

    def get(self, run: TrialRecord, name: str) -> ray.ObjectRef:
        """The state of this name.

        Raises:
            StudyError: it is missing or damaged.
        """
        import ray

        key = (_name(run), name)
        if key not in self._there:
            place = self._confirmation.trial_folder(run)
            try:
                found = self._confirmation.read_state(run, name)
            except Damaged as error:
                raise StudyError(f"{error} is damaged; `lbstudy confirm` trains this run again") from error
            if found is None:
                raise StudyError(f"{place / name}.pt is missing; without {place}, `lbstudy confirm` trains it again")
            self._there[key] = ray.put(found[1])
        return self._there[key]


def _as_they_come(
    waiting: dict[ray.ObjectRef, Task], minutes: float, notice: Callable[[str], None]
) -> Iterator[tuple[Task, ray.ObjectRef]]:
    """The tasks and their answers, as these come.

    Raises:
        StudyError: for so many minutes there was none.
    """
    import ray

    from lbstudy.tuning.groups import holders, list_groups, list_jobs, own_job

    last = time.monotonic()
    while waiting:
        left = max(0.0, last + 60 * minutes - time.monotonic())
        finished = ray.wait(list(waiting), num_returns=1, timeout=min(left, REMIND_SECONDS))[0]
        if finished:
            last = time.monotonic()
        else:
            others = holders(["CPU", "GPU"], list_groups(), list_jobs(), own_job())
            waited = (time.monotonic() - last) / 60
            words = f"no result for {waited:.0f} min" + (f": {'; '.join(others)}" if others else "")
            if left <= REMIND_SECONDS:
                raise StudyError(f"{words}; given up (resources.timeout_minutes); what is there stays")
            notice(f"{words}; for up to {minutes:g} min (resources.timeout_minutes)")
        for answer in finished:
            yield waiting.pop(answer), answer


def _compute(
    kind: Kind, run: dict[str, Any], settings: dict[str, Any], part: int, dataset: Dataset, code: Code, *states: bytes
) -> dict[str, bytes]:
    """On a worker: the files of a task by name; the one without a name is the result."""
    import torch

    from lbstudy.methods import user_code
    from lbstudy.training.data import place

    user_code.activate(code)
    spec = RunSpec.model_validate(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = spec.model_dump_json(include={"dataset", "split_seed", "train_on", "model", "precision"})
    key += code.digest
    data = _keep("data", key, lambda: place(dataset, spec.dataset, spec.split_seed, device, spec.train_on))
    loaded = [_load(state, device) for state in states]
    model = _network(spec, data, loaded[-1])
    if kind == "sharpness":
        from lbstudy.analysis.minima.sharpness import SharpnessSpec, measure

        found = measure(model, data, data.train, SharpnessSpec.model_validate(settings))
        return {"": json.dumps(found.as_json()).encode()}
    if kind == "noise":
        from lbstudy.analysis.minima.noise import NoiseSpec
        from lbstudy.analysis.minima.noise import measure as measure_noise

        rows = measure_noise(model, spec, data, part, NoiseSpec.model_validate(settings))
        return {"": json.dumps([row._asdict() for row in rows]).encode()}
    from lbstudy.analysis.minima.landscape import evaluate_points, prepare

    chosen = LandscapeSettings.model_validate(settings)
    key += chosen.model_dump_json(include={"samples", "seed"})
    images = _keep("images", key, lambda: prepare(model, data, chosen.samples, chosen.seed))
    points, files = _points(kind, model, loaded, chosen)
    here = slice(part * CHUNK, (part + 1) * CHUNK)
    points = points._replace(coordinates=points.coordinates[here], coefficients=points.coefficients[here])
    frame = evaluate_points(model, points, images)
    files[""] = frame.to_csv(index=False, na_rep="nan").encode()
    return files if part == 0 else {"": files[""]}


def _points(
    kind: Kind, model: nn.Module, states: Sequence[Any], settings: LandscapeSettings
) -> tuple[Points, dict[str, bytes]]:
    """All points of a landscape, and what else there is to keep of it."""
    from lbstudy.analysis.minima import landscape
    from lbstudy.analysis.minima.directions import DirectionSpec

    spec = DirectionSpec(
        seed=settings.seed, normalisation=settings.normalisation, biases_and_norms=settings.biases_and_norms
    )
    if kind == "line":
        return landscape.line(model, spec, settings.directions), {}
    if kind == "plane":
        return landscape.plane(model, spec), {}
    if kind == "interpolate":
        return landscape.interpolate(model, *states), {}
    found = landscape.trajectory(model, states)
    path = {"path": found.path.tolist(), "explained": found.explained.tolist()}
    return found.points, {"path.json": json.dumps(path).encode()}


def _load(state: bytes, device: str) -> Any:
    import torch

    return torch.load(io.BytesIO(state), map_location=device, weights_only=True)


def _network(spec: RunSpec, data: ImageData, state: dict[str, torch.Tensor]) -> nn.Module:
    from lbstudy.methods import models
    from lbstudy.training.train import DTYPES

    model = models.build(spec.model.name, data.shape, data.classes, spec.ghost, spec.model.settings)
    model = model.to(data.device, DTYPES[spec.precision])
    model.load_state_dict(state)
    return model.eval()


_kept: dict[str, tuple[str, Any]] = {}  # what this process holds for its next task


def _keep(what: str, key: str, make: Callable[[], Any]) -> Any:
    """What was made last of a sort, if it is this one, or else a new one in its place."""
    if what not in _kept or _kept[what][0] != key:
        _kept.pop(what, None)
        _kept[what] = (key, make())
    return _kept[what][1]
