"""The command line: parse, call, print. Exit codes: 0 done, 1 some trials failed or are missing, 2 bad input."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track as rich_track
from rich.table import Table

from lbstudy import __version__
from lbstudy.confirm import as_study, plan_runs
from lbstudy.interrupt import Interrupted, interruptible
from lbstudy.lock import DriverLock
from lbstudy.progress import Progress, TaskProgress
from lbstudy.records import FINISHED, StudyFolder, TrialRecord
from lbstudy.runspec import Spec, TrainOn
from lbstudy.storage import StorageError, StoragePath, locate
from lbstudy.study import StudyError, StudySpec, check_study, find_study
from lbstudy.study_checks import notices
from lbstudy.study_file import KeyProblems, StudyFile, parse_override

if TYPE_CHECKING:
    import pandas as pd

    from analysis.minima import Task
    from lbstudy.datasets import Dataset

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class TableFormat(StrEnum):
    """How `best` and `table` print."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


class LandscapeKind(StrEnum):
    """What `landscape` computes."""

    line = "line"
    plane = "plane"
    interpolate = "interpolate"
    trajectory = "trajectory"


class TableKind(StrEnum):
    """What `table` shows."""

    gap = "gap"
    targets = "targets"
    health = "health"
    sharpness = "sharpness"
    correlations = "correlations"


class FigureFormat(StrEnum):
    """What `figures` writes."""

    svg = "svg"
    png = "png"
    pdf = "pdf"


DEMO = {"cells.smoothing": ["none", "mixup"], "tuning.trials": 5}
"""What the demo changes in the study of the digits: half of its cells."""

Normalisation = Literal["filter", "layer", "none"]
File = Annotated[str, typer.Argument(help="a study file, the name of a shipped study, or a study's folder")]
Folder = Annotated[str, typer.Argument(help="a study's folder, or its address in an object store", metavar="STUDY")]
Storage = Annotated[str, typer.Option(help="the study's folder is made in this one; a folder, or s3://BUCKET/FOLDER")]
Name = Annotated[str | None, typer.Option(help="name of the study and its folder")]
Trials = Annotated[int | None, typer.Option(help="trials per cell")]
Epochs = Annotated[int | None, typer.Option(help="epochs per trial")]
WorkersOption = Annotated[int | None, typer.Option(help="data-parallel workers per trial")]
Data = Annotated[
    str | None, typer.Option(metavar="ROOT", help="a local copy of the data: torchvision's files, or an image tree")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change any key of the study file; may be repeated"),
]
Address = Annotated[
    str | None, typer.Option(help="a Ray cluster; default: $RAY_ADDRESS, else a private Ray on this machine")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show what Ray says")]


def main() -> None:
    """Entry point: bad input, or a storage that fails, is one message and exit code 2, never a traceback."""
    try:
        app()
    except (StudyError, StorageError) as error:
        for line in str(error).splitlines():
            err.print(f"error: {line}", markup=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """A hyper-parameter study of large mini-batch training, on Ray."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(storage: Storage = "studies", verbose: Verbose = False) -> None:
    """A whole study in a few minutes: LeNet-5 on handwritten digits, small against large batch, from the tuning of
    every cell to the report."""
    from analysis import minima, report
    from analysis.sharpness import SharpnessSpec

    source = StudyFile(find_study("digits.yaml"), DEMO)
    study = check_study(source)
    path = (locate(storage) / study.name).resolve()
    folder, failures = StudyFolder(path), list[str]()

    def work() -> None:
        _tune(study, path, dataset, verbose)
        _confirm(study, folder, plan_runs(folder, study, 3, 1, False, "split", _notice), "split", dataset, verbose)
        one, all_seeds = minima.best_runs(folder, repeats=1), minima.best_runs(folder)
        lines, measures = minima.LandscapeSettings(directions=3), SharpnessSpec(samples=200)
        parts: list[tuple[str, Spec, list[Task]]] = [
            ("landscape/line", lines, minima.landscape_tasks(folder, "line", all_seeds, lines)),
            ("landscape/interpolate", lines, minima.landscape_tasks(folder, "interpolate", one, lines)),
            ("sharpness", measures, minima.sharpness_tasks(one, measures)),
        ]
        for where, settings, tasks in parts:
            minima.keep_settings(folder, where, settings)
            _compute_tasks(study, folder, minima.missing(folder, tasks), where, dataset, failures)

    with _ended_in_order(path, "the same command"):
        StudyFolder.check(path, study)
        _require_room(study, None)
        dataset = _load_data(study, source)
        with DriverLock(path, _notice):
            _on_ray(work, path, verbose)
    _print_best(folder, TableFormat.table)
    print(f"report: {report.write(folder)}")
    for failure in failures:
        err.print(f"failed: {failure}", markup=False)
    raise typer.Exit(1 if failures else 0)


@app.command()
def plan(
    file: File, name: Name = None, trials: Trials = None, epochs: Epochs = None, workers: WorkersOption = None,
    data: Data = None, set_: Sets = None,
) -> None:  # fmt: skip
    """Show what a study would do here: cells, ranges, budget, lanes. Runs nothing."""
    study, source = _resolve(file, name, trials, epochs, workers, data, set_)
    _print_plan(study, source)


@app.command()
def run(
    file: File, storage: Storage = "studies", name: Name = None, trials: Trials = None, epochs: Epochs = None,
    workers: WorkersOption = None, address: Address = None, data: Data = None, set_: Sets = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Tune every cell of a study. Given the folder of a study, or run again, it does what is missing."""
    study, source = _resolve(file, name, trials, epochs, workers, data, set_)
    given = locate(file)
    going_on = given.is_dir() and name is None
    _run(study, source, given if going_on else locate(storage) / study.name, address, verbose)


@app.command()
def confirm(
    study: Folder,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each configuration, with the same seeds in all cells")] = 5,
    top: Annotated[int, typer.Option(min=1, help="configurations of each cell, best first")] = 1,
    published: Annotated[bool, typer.Option("--published", help="the published configurations too")] = False,
    train_on: Annotated[TrainOn, typer.Option(help="the tuning split, or all training samples")] = "split",
    workers: WorkersOption = None, address: Address = None, data: Data = None, set_: Sets = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train each cell's best configuration again with fresh seeds, and test it. Run again, it does what is missing."""
    spec, source = _resolve(study, None, None, None, workers, data, set_)
    folder = StudyFolder.open(locate(study).resolve())
    folder.require_extension(spec)
    runs = plan_runs(folder, spec, seeds, top, published, train_on, _notice)
    command = f"lbstudy confirm {folder.path}"
    with _ended_in_order(folder.confirmation.path, command):
        _require_room(spec, address)
        dataset = _load_data(spec, source)
        with DriverLock(folder.path, _notice):
            _on_ray(partial(_confirm, spec, folder, runs, train_on, dataset, verbose), folder.path, verbose)
    _print_best(folder, TableFormat.table)
    wanted = {(run.cell, run.number) for run in runs}
    found = [trial for trial in folder.confirmation.trials() if (trial.cell, trial.number) in wanted]
    _exit(found, len(runs), command)


@app.command()
def landscape(
    study: Folder,
    kind: Annotated[LandscapeKind, typer.Option(help="line and plane: random directions around each solution; "
        "interpolate: from the small-batch solution to the large-batch one; trajectory: a run's path")] =
        LandscapeKind.line,
    directions: Annotated[int, typer.Option(min=1, help="line: random directions, the same for every model")] = 5,
    normalisation: Annotated[Normalisation, typer.Option(help="none: the plain Gaussian")] = "filter",
    biases_and_norms: Annotated[bool, typer.Option("--biases-and-norms", help="move these too")] = False,
    samples: Annotated[int, typer.Option(min=1, help="of the training and of the test set; all if fewer")] = 10_000,
    repeats: Annotated[int | None, typer.Option(min=1, help="confirmed runs of each cell; default: all, and one for "
        "plane and trajectory")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of directions and samples")] = 0,
    address: Address = None, data: Data = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Loss and accuracy around the confirmed runs' solutions. Run again, it computes what is missing."""
    from analysis import minima

    folder = StudyFolder.open(study)
    if repeats is None and kind in (LandscapeKind.plane, LandscapeKind.trajectory):
        repeats = 1
    settings = minima.LandscapeSettings(
        directions=directions,
        normalisation=normalisation,
        biases_and_norms=biases_and_norms,
        samples=samples,
        seed=seed,
    )
    tasks = minima.landscape_tasks(folder, kind.value, minima.best_runs(folder, repeats), settings)
    _compute(folder, study, tasks, f"landscape/{kind.value}", settings, address, data, verbose)


@app.command()
def sharpness(
    study: Folder,
    samples: Annotated[int, typer.Option(min=2, help="training images that are measured on; all if fewer")] = 1000,
    repeats: Annotated[int | None, typer.Option(min=1, help="confirmed runs of each cell; default: all")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of samples, probes and draws")] = 0,
    address: Address = None, data: Data = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """How sharp the confirmed runs' solutions are: Hessian, Keskar's measure, SAM's. Run again, it does what is
    missing."""
    from analysis import minima
    from analysis.sharpness import SharpnessSpec

    folder = StudyFolder.open(study)
    settings = SharpnessSpec(samples=samples, seed=seed)
    tasks = minima.sharpness_tasks(minima.best_runs(folder, repeats), settings)
    _compute(folder, study, tasks, "sharpness", settings, address, data, verbose)


def _compute(
    folder: StudyFolder, study: str, tasks: Sequence[Task], where: str, settings: Spec, address: str | None,
    data: str | None, verbose: bool,
) -> None:  # fmt: skip
    """Compute on Ray what is missing of the tasks."""
    from analysis import minima

    spec, source = _resolve(study, None, None, None, None, data, None)
    minima.keep_settings(folder, where, settings)
    failures: list[str] = []
    if missing := minima.missing(folder, tasks):
        _require_room(spec, address, workers=1)
        dataset = _load_data(spec, source)
        with _ended_in_order(folder.path, "the same command"):
            work = partial(_compute_tasks, spec, folder, missing, where, dataset, failures)
            _on_ray(work, folder.path, verbose)
    for failure in failures:
        err.print(f"failed: {failure}", markup=False)
    print(f"{len(tasks) - len(failures)} of {len(tasks)} results in {folder.path / where}")
    raise typer.Exit(1 if failures else 0)


@app.command("doctor")
def examine(
    file: Annotated[str | None, typer.Argument(help="a study that shall run here")] = None,
    storage: Storage = "studies", address: Address = None,
) -> None:  # fmt: skip
    """Check Ray, its nodes and the storage, and whether a study fits; exit code 2 if something is wrong."""
    study, dataset = None, None
    if file is not None:
        study, source = _resolve(file, None, None, None, None, None, None)
        dataset = _load_data(study, source)
    folder = locate(storage)
    _set_address(address)
    from lbstudy import doctor

    failed = False
    for finding in doctor.examine(study, dataset, folder):
        mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
        out.print(f"{mark} {escape(finding.name)}: {escape(finding.sentence)}", highlight=False, soft_wrap=True)
        failed |= not finding.ok
    raise typer.Exit(2 if failed else 0)


@app.command()
def status(study: Folder) -> None:
    """How far each cell of a study has come."""
    from analysis import tables

    folder = StudyFolder.open(study)
    _print_table(tables.for_reading(tables.progress(folder)), title=folder.study().name)


@app.command()
def best(
    study: Folder, format: Annotated[TableFormat, typer.Option(help="how to print it")] = TableFormat.table
) -> None:
    """The best configuration of each cell."""
    _print_best(StudyFolder.open(study), format)


@app.command()
def table(
    study: Folder,
    kind: Annotated[TableKind, typer.Argument(help="gap: small against large batch; targets: time to reach a loss and "
                                              "an accuracy; health: can the comparison be trusted; sharpness: how "
                                              "sharp the minima are, and their test accuracy; correlations: of both")],
    format: Annotated[TableFormat, typer.Option(help="how to print it")] = TableFormat.table,
    loss: Annotated[float | None, typer.Option(help="targets: training loss; default: the baseline's")] = None,
    accuracy: Annotated[float | None, typer.Option(help="targets: validation accuracy, a fraction")] = None,
) -> None:  # fmt: skip
    """Compare the cells of a study, by their confirmed runs."""
    if kind is not TableKind.targets and (loss is not None or accuracy is not None):
        raise StudyError(f"--loss and --accuracy are for the table `targets`, but got `{kind.value}`")
    from analysis import gaps, health, load, minima_table, tables, targets

    folder = StudyFolder.open(study)
    spec, trials = folder.study(), load.trials(folder)
    confirmed = load.confirmed(folder, trials)
    if kind is TableKind.gap:
        found = gaps.gap_table(spec, confirmed)
    elif kind is TableKind.targets:
        goals = targets.choose_targets(spec, confirmed, loss, accuracy)
        found = targets.targets_table(spec, confirmed, load.confirmed_epochs(folder), goals)
    elif kind is TableKind.health:
        found = health.health_table(folder)
    else:
        sharpness, lines = load.sharpness(folder, trials), load.landscape(folder, "line", trials)
        found = minima_table.minima_table(spec, minima_table.runs(confirmed, sharpness, lines))
        if kind is TableKind.correlations:
            found = minima_table.correlations(found)
        elif format is TableFormat.table:
            found = minima_table.for_terminal(found)
        for sentence in (minima_table.WHICH_SIDE, *minima_table.list_left_out(sharpness, lines)):
            err.print(sentence, markup=False)
    if format is TableFormat.table:
        shown = tables.for_reading(found, digits=3)
        _print_table(shown.loc[:, (shown != "-").any()], title=f"{spec.name}: {kind.value}")
    else:
        print(tables.render(found, format.value))  # type: ignore[arg-type]
    for sentence in health.list_missing(spec, trials, confirmed):
        err.print(f"missing: {sentence}", markup=False)


@app.command()
def figures(
    study: Folder, format: Annotated[FigureFormat, typer.Option(help="of the files")] = FigureFormat.svg
) -> None:
    """Draw a study's figures into its folder; what cannot be drawn is named, with the reason."""
    from analysis import figures

    for drawing, path in figures.write_all(StudyFolder.open(study), format.value):
        print(path if path else f"left out {drawing.name}: {drawing.reason}")


@app.command()
def report(study: Folder) -> None:
    """Write the study's report, one self-contained page: the answer, the evidence, and what is missing."""
    from analysis import report

    print(report.write(StudyFolder.open(study)))


@app.command()
def schema() -> None:
    """The JSON Schema of the study file, for editors."""
    print(json.dumps(StudySpec.model_json_schema(by_alias=True), indent=2))


def _resolve(
    file: str, name: str | None, trials: int | None, epochs: int | None, workers: int | None, data: str | None,
    sets: list[str] | None,
) -> tuple[StudySpec, StudyFile]:  # fmt: skip
    overrides = dict(parse_override(text) for text in sets or [])
    flags = {
        "name": name,
        "tuning.trials": trials,
        "budget": None if epochs is None else {"epochs": epochs},
        "resources.workers": workers,
        "dataset.root": data,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    source = StudyFile(find_study(file), overrides)
    return check_study(source, written_by_hand=not locate(file).is_dir()), source


def _set_address(address: str | None) -> None:
    """Before Ray is imported: it decides on authentication then."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address


def _load_data(study: StudySpec, source: StudyFile) -> Dataset:
    """Read a study's data and make sure that they fit each other."""
    from lbstudy import datasets

    try:
        dataset = datasets.load(study.dataset, _track)
        datasets.check(study, dataset)
    except KeyProblems as error:
        raise source.error(error.problems) from error
    return dataset


def _run(study: StudySpec, source: StudyFile, path: StoragePath, address: str | None, verbose: bool) -> None:
    for message in notices(study):
        _notice(message)
    if left_out := study.left_out():
        err.print(f"left out by cells.exclude: {', '.join(cell.name for cell in left_out)}")
    path = path.resolve()
    command = f"lbstudy run {path}"
    with _ended_in_order(path, command):
        StudyFolder.check(path, study)
        _require_room(study, address)
        dataset = _load_data(study, source)
        with DriverLock(path, _notice):
            _on_ray(lambda: _tune(study, path, dataset, verbose), path, verbose)
    folder = StudyFolder.open(path)
    _print_best(folder, TableFormat.table)
    _exit(folder.trials(), len(study.list_cells()) * study.tuning.trials, command)


@contextmanager
def _ended_in_order(path: StoragePath, command: str) -> Iterator[None]:
    """Around the work on the study at this path: whoever interrupts it is told how to go on.

    Raises:
        typer.Exit: Ctrl-C or SIGTERM.
    """
    try:
        with interruptible():
            yield
    except Interrupted as interrupted:
        begun = (path / "study.yaml").is_file()
        hint = f"what has finished is safe; to go on: {command}" if begun else "the study had not begun"
        err.print(f"interrupted by {interrupted}; {hint}")
        raise typer.Exit(interrupted.exit_code) from interrupted


def _require_room(study: StudySpec, address: str | None, workers: int | None = None) -> None:
    """Whether this machine can hold a trial, or other work of so many workers, is known long before a private Ray is
    up.

    Raises:
        StudyError: it cannot.
    """
    from lbstudy.resources import count_lanes, this_machine, with_gpus

    _set_address(address)
    if "RAY_ADDRESS" not in os.environ:
        machine = [this_machine()]
        resources = study.resources.model_copy(update={"workers": workers or study.resources.workers})
        count_lanes(with_gpus(resources, machine), machine)


def _exit(trials: Sequence[TrialRecord], count: int, command: str) -> NoReturn:
    """Say what has failed and what is missing of so many trials, and with which command to go on.

    Raises:
        typer.Exit: with code 1 where anything has failed or is missing, else 0.
    """
    if failed := [t for t in trials if t.status == "failed"]:
        err.print(f"{len(failed)} trials failed; the first one, {failed[0].cell} trial {failed[0].number}, with:")
        err.print(failed[0].error.strip().splitlines()[-1], markup=False)
    missing = count - sum(t.status in FINISHED for t in trials)
    if missing:
        err.print(f"{missing} trials are missing; to go on: {command}")
    raise typer.Exit(1 if failed or missing else 0)


def _tune(study: StudySpec, path: StoragePath, dataset: Dataset, verbose: bool) -> None:
    """Run what is missing on the connected Ray."""
    from lbstudy import doctor, tuner

    planned = tuner.plan(study, dataset, tuner.cluster_nodes())
    doctor.require(doctor.before_a_run(planned, path))
    folder = StudyFolder.create(path, planned.study)
    cells = len(planned.epochs)
    err.print(f"{cells} cells x {study.tuning.trials} trials on {planned.lanes} lanes; records in {path}")
    with Progress(study, err) as progress:
        tuner.tune_study(folder, planned, progress.update, _notice, verbose)


def _confirm(
    study: StudySpec, folder: StudyFolder, runs: Sequence[TrialRecord], train_on: TrainOn, dataset: Dataset,
    verbose: bool,
) -> None:  # fmt: skip
    """Run what is missing of the confirmed runs on the connected Ray."""
    from lbstudy import doctor, tuner

    where = folder.confirmation
    planned = tuner.plan(as_study(study, runs), dataset, tuner.cluster_nodes(), train_on)
    doctor.require(doctor.before_a_run(planned, where.path))
    StudyFolder.create(where.path, study)
    err.print(f"{len(runs)} confirming runs on {planned.lanes} lanes; records in {where.path}")
    with Progress(planned.study, err, Counter(run.cell for run in runs)) as progress:
        tuner.confirm_runs(where, planned, runs, progress.update, _notice, verbose)


def _compute_tasks(
    study: StudySpec, folder: StudyFolder, tasks: Sequence[Task], where: str, dataset: Dataset, failures: list[str]
) -> None:
    """Compute tasks on the connected Ray; adds to `failures` what has failed and why."""
    from analysis import minima

    with TaskProgress(where, len(tasks), err) as progress:

        def failed(task: Task, reason: str) -> None:
            failures.append(f"{task.result}: {reason}")
            progress.advance()

        minima.compute(folder, study, dataset, tasks, lambda task: progress.advance(), failed)


def _on_ray(work: Callable[[], None], path: StoragePath, verbose: bool) -> None:
    """Join or start Ray, and work on the study at this path."""
    from lbstudy import tuner

    err.print("joining the cluster ..." if "RAY_ADDRESS" in os.environ else "starting Ray ...")
    try:
        tuner.connect(verbose)
        try:
            work()
        except OSError as error:
            raise StudyError(
                f"{path}: {error.strerror or error}; what has finished is safe, and the same command goes on"
            ) from error
    except KeyboardInterrupt:
        err.print("ending the trials at work; once more to leave at once")
        raise
    finally:
        tuner.disconnect()


def _notice(message: str) -> None:
    err.print(f"notice: {message}", markup=False)


def _track(files: Iterable[Any], count: int) -> Iterable[Any]:
    return rich_track(files, "decoding the images, once", total=count, console=err)


def _print_plan(study: StudySpec, source: StudyFile) -> None:
    from lbstudy import datasets
    from lbstudy.resources import count_lanes, this_machine, with_gpus

    table = Table(title=f"{study.name}: {study.model} on {study.dataset.name}", title_justify="left")
    names = list(dict.fromkeys(name for cell in study.list_cells() for name in study.ranges(cell)))
    for heading in ("cell", "steps per epoch", *names, "published"):
        table.add_column(heading)
    try:
        samples: int | None = datasets.training_samples(study.dataset, _load_data(study, source))
    except StudyError as error:
        err.print(f"the study cannot run here: {error}", markup=False)
        samples = None
    for cell in study.list_cells():
        ranges = study.ranges(cell)
        steps = "?" if samples is None else str(study.steps_per_epoch(cell, samples))
        published = str(len(study.published_params(cell)) or "-")
        table.add_row(cell.name, steps, *(str(ranges.get(name, "-")) for name in names), published)
    out.print(table)
    if left_out := study.left_out():
        out.print(f"left out by cells.exclude: {', '.join(cell.name for cell in left_out)}")
    budget, tuning, resources = study.budget, study.tuning, study.resources
    length = f"{budget.epochs} epochs" if budget.epochs else f"{budget.steps} steps"
    cells = len(study.list_cells())
    pruner = "no pruner" if tuning.pruner == "none" else (
        f"ASHA from epoch {tuning.pruner.grace_period}, one in {tuning.pruner.reduction_factor:g} passes a rung"
    )  # fmt: skip
    out.print(f"budget: {cells} cells x {tuning.trials} trials x at most {length}; {tuning.sampler}, {pruner}")
    machine = this_machine()
    resources = with_gpus(resources, [machine])
    each = f"{resources.cpus_per_worker:g} CPU" + (
        f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    )
    try:
        lanes = f"{min(count_lanes(resources, [machine]), cells * tuning.trials)} lanes on this machine"
    except StudyError as error:
        lanes = f"not on this machine: {error}"
    out.print(f"resources: {resources.workers} workers a trial, {each} each; {lanes}")
    fixed = study.fixed.model_dump(exclude_none=True, exclude={"mixup", "noise"})
    out.print("fixed: " + ", ".join(f"{key} {value}" for key, value in fixed.items()))


def _print_best(folder: StudyFolder, style: TableFormat) -> None:
    from analysis import tables

    configs = tables.best_configs(folder)
    if style is not TableFormat.table:
        print(tables.render(configs, style.value))  # type: ignore[arg-type]
        return
    study = folder.study()
    _print_table(tables.for_terminal(configs), title=f"{study.name}: best configurations")
    out.print(f"c/p/d/f: completed, pruned, diverged, failed. {tables.budget_sentence(study, configs)}")
    if configs["edge"].any():
        out.print("edge: the best value lies within 5 % of that end of its range; consider a wider one.")


def _print_table(frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in frame:
        words = frame[column].str.contains("[a-z]").any()
        table.add_column(str(column).replace("_", " "), justify="left" if words else "right", no_wrap=bool(words))
    for row in frame.itertuples(index=False):
        table.add_row(*map(escape, row))
    out.print(table)
