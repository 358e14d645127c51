"""The command line: parse, call, print.

Exit codes: 0 done, 1 some trials failed or are missing, 2 bad input or a place that cannot be used, 3 an error that
nobody foresaw, whose traceback lies in a file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.text import Text

from lbstudy import __version__, trackers
from lbstudy.console.begin import Place, begin
from lbstudy.console.costs import print_costs
from lbstudy.console.plan import described, print_plan
from lbstudy.console.results import Folder, TableFormat, print_best, results
from lbstudy.console.session import (
    again,
    compute_tasks,
    confirm_runs,
    ended_in_order,
    err,
    exit_with,
    load_data,
    notice,
    on_ray,
    require_room,
    resolve,
    run_study,
    set_address,
    tune,
)  # fmt: skip
from lbstudy.console.terminal import out
from lbstudy.console.track import TrackerChoice
from lbstudy.console.whole import Evidence, whole_study
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock
from lbstudy.records.provenance import utc_now
from lbstudy.storage import StorageError, StoragePath, locate, real_path
from lbstudy.study.file import StudyError
from lbstudy.study.run import Spec, TrainOn
from lbstudy.study.spec import StudySpec
from lbstudy.tuning.confirm import plan_runs

if TYPE_CHECKING:
    from lbstudy.analysis.minima.compute import Task

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

app.add_typer(results)


RUN_EXTRA = ("ray", "torch", "torchvision", "optuna", "sklearn", "PIL")
"""What the package's extra `run` brings, by the names that are imported."""


class LandscapeKind(StrEnum):
    """What `landscape` computes."""

    line = "line"
    plane = "plane"
    interpolate = "interpolate"
    trajectory = "trajectory"


Normalisation = Literal["filter", "layer", "none"]
File = Annotated[str, typer.Argument(help="a study file, the name of a shipped study, or a study's folder")]
Storage = Annotated[str, typer.Option(help="the study's folder is made in this one; a folder, or s3://BUCKET/FOLDER")]
MaybeStorage = Annotated[
    str | None,
    typer.Option(help="the study's folder is made in this one; a folder, or s3://BUCKET/FOLDER; default: studies"),
]
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
Seeds = Annotated[
    int, typer.Option(min=1, help="confirmed runs of each configuration, with the same seeds in all cells")
]
Published = Annotated[bool, typer.Option("--published", help="confirm the published configurations too")]
Address = Annotated[
    str | None, typer.Option(help="a Ray cluster; default: $RAY_ADDRESS, else a private Ray on this machine")
]
Track = Annotated[
    list[TrackerChoice] | None,
    typer.Option(help="tell a tracker of every trial: tensorboard, mlflow or wandb; may be repeated"),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show what Ray says")]


def main() -> None:
    """Entry point: whatever goes wrong is one message, never a traceback on the terminal."""
    os.environ["MPLBACKEND"] = "agg"  # no figure is shown; a notebook leaves its own backend in the environment
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        app()
    except (StudyError, StorageError) as error:
        _complain(str(error), 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}", 2, _keep_traceback())
    except UnicodeError as error:
        _complain(f"a name that is no UTF-8 text cannot be used: {error}", 2, _keep_traceback())
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in RUN_EXTRA:
            _complain(f"this needs {error.name}, which looking at studies does not: pip install 'lbstudy[run]'", 2)
        what = " ".join(str(error).split()) or "no message"
        _complain(f"unexpected, please report it: {type(error).__name__}: {what}", 3, _keep_traceback())


def _complain(message: str, code: int, log: str = "") -> NoReturn:
    """Say what is wrong and leave."""
    for line in (message + log).splitlines():  # an indented one belongs to the error above it
        err.print(line if line.startswith(" ") else f"error: {line}")
    sys.exit(code)


def _keep_traceback() -> str:
    """Write the traceback of the exception at hand into a file; returns words that say where."""
    content = f"{utc_now()} lbstudy {__version__}: {sys.argv}\n{traceback.format_exc()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lbstudy-error-", suffix=".log", delete=False, errors="backslashreplace"
        ) as log:
            log.write(content)
    except OSError as error:
        return f" (its traceback could not be written: {error})"
    return f" (traceback in {log.name})"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """A hyper-parameter study of large mini-batch training, on Ray."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(storage: Storage = "studies", name: Name = None, set_: Sets = None, verbose: Verbose = False) -> None:
    """A whole study in a few minutes: LeNet-5 on handwritten digits, small against large batch, from the tuning of
    every cell to the report."""
    from lbstudy.analysis.minima.compute import LandscapeSettings
    from lbstudy.analysis.minima.sharpness import SharpnessSpec

    study, source = resolve("demo.yaml", name, None, None, None, None, set_)
    large = max(study.cells.batch_size)
    wanted = Evidence(
        LandscapeSettings(directions=2, samples=200),
        SharpnessSpec(samples=100),
        looks_at=lambda run: run.repeat < (3 if run.batch_size == large else 1),
    )
    path = real_path(locate(storage) / study.name)
    hint = "next: lbstudy init DIR writes a study of your own to begin with"
    whole_study(study, source, path, wanted, None, "the same command", verbose, hint)


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="where to write; made where it is missing", metavar="DIR")],
    cluster: Annotated[Place | None, typer.Option(help="and the files of a place to run it")] = None,
) -> None:
    """Write a commented study to begin with, which runs as it stands; never overwrites."""
    written = begin(Path(folder).expanduser(), cluster)
    print("\n".join(map(str, written)))
    err.print(f"what it would do: lbstudy plan {quote(str(written[0]))}")
    if cluster is not None:
        err.print(f"what to fill in is marked FILL IN; docs/cluster/{cluster.value}.md of the source walks through it")


@app.command()
def plan(
    file: File, name: Name = None, trials: Trials = None, epochs: Epochs = None, workers: WorkersOption = None,
    data: Data = None, set_: Sets = None,
    measure: Annotated[bool, typer.Option("--measure", help="train one or two epochs of each kind of run, and tell "
        "what the study costs: time, memory, disk")] = False,
    price: Annotated[float | None, typer.Option(min=0, metavar="PER_HOUR", help="with --measure: money for an hour of "
        "a GPU, or of a CPU core where no GPU is used")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="with --measure: confirmed runs of each cell, default 5")]
    = None, address: Address = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show what a study would do here: cells, ranges, budget, lanes. Runs nothing, unless it measures."""
    study, source = resolve(file, name, trials, epochs, workers, data, set_)
    for option, value in {"price": price, "seeds": seeds}.items():
        if value is not None and not measure:
            raise StudyError(f"--{option} needs --measure: it is about what the study costs, which is measured")
    images = print_plan(study, source)
    if measure:
        print_costs(study, images, address, price, seeds or 5, verbose)
    else:
        out.print("cost: not measured; --measure trains an epoch or two of each kind of run, and tells time and memory")


@app.command()
def run(
    file: File, storage: MaybeStorage = None, name: Name = None, trials: Trials = None, epochs: Epochs = None,
    workers: WorkersOption = None, address: Address = None, data: Data = None, set_: Sets = None,
    track: Track = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Tune every cell of a study. Given the folder of a study, or run again, it does what is missing."""
    study, source = resolve(file, name, trials, epochs, workers, data, set_, track)
    path = _place(file, storage, name, study)
    command = again(f"lbstudy run {quote(str(path))}", address)
    run_study(study, source, path, address, command, lambda images: tune(study, path, images, verbose), verbose)
    folder = StudyFolder.open(path)
    print_best(folder, TableFormat.table)
    exit_with(folder.trials(), len(study.list_cells()) * study.tuning.trials, command)


def _place(file: str, storage: str | None, name: str | None, study: StudySpec) -> StoragePath:
    """Where the study of a file lies, or shall lie.

    Raises:
        StudyError: it lies somewhere already, and shall lie somewhere else.
    """
    given = locate(file)
    going_on = given.is_dir() and name is None
    if going_on and storage is not None:
        raise StudyError(
            f"--storage {storage}: {file} is a study's folder, and it goes on there; leave --storage out, or begin "
            "another study like it with --name"
        )
    return real_path(given if going_on else locate(storage or "studies") / study.name)


@app.command("all")
def run_all(
    file: File, storage: MaybeStorage = None, name: Name = None, trials: Trials = None, epochs: Epochs = None,
    workers: WorkersOption = None, seeds: Seeds = 5, published: Published = False, address: Address = None,
    data: Data = None, set_: Sets = None, track: Track = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """From the study file to the report in one go: run, confirm, landscape (line and interpolate), sharpness, report.
    Run again, it does what is missing."""
    from lbstudy.analysis.minima.compute import LandscapeSettings
    from lbstudy.analysis.minima.sharpness import SharpnessSpec

    study, source = resolve(file, name, trials, epochs, workers, data, set_, track)
    path = _place(file, storage, name, study)
    command = f"lbstudy all {quote(str(path))}" + f" --seeds {seeds}" * (seeds != 5) + " --published" * published
    wanted = Evidence(LandscapeSettings(), SharpnessSpec(), seeds, published)
    whole_study(study, source, path, wanted, address, again(command, address), verbose)


@app.command()
def confirm(
    study: Folder,
    seeds: Seeds = 5,
    top: Annotated[int, typer.Option(min=1, help="configurations of each cell, best first")] = 1,
    published: Published = False,
    train_on: Annotated[TrainOn, typer.Option(help="the tuning split, or all training samples")] = "split",
    workers: WorkersOption = None, address: Address = None, data: Data = None, set_: Sets = None,
    track: Track = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train each cell's best configuration again with fresh seeds, and test it. Run again, it does what is missing."""
    folder = StudyFolder.open(real_path(locate(study)))
    spec, source = resolve(study, None, None, None, workers, data, set_, track)
    trackers.require(spec.resources.track)
    folder.require_extension(spec)
    runs = plan_runs(folder, spec, seeds, top, published, train_on, notice)
    command = again(f"lbstudy confirm {quote(str(folder.path))}", address)
    with ended_in_order(folder.confirmation.path, command):
        require_room(spec, address)
        images = load_data(spec, source, folder.path)
        with DriverLock(folder.path, notice):
            on_ray(partial(confirm_runs, spec, folder, runs, train_on, images, verbose), folder.path, verbose)
    print_best(folder, TableFormat.table)
    wanted = {(run.cell, run.number) for run in runs}
    found = [trial for trial in folder.confirmation.trials() if (trial.cell, trial.number) in wanted]
    exit_with(found, len(runs), command)


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
    address: Address = None, data: Data = None, set_: Sets = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Loss and accuracy around the confirmed runs' solutions. Run again, it computes what is missing."""
    from lbstudy.analysis.minima import compute as minima

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
    _compute(folder, study, tasks, f"landscape/{kind.value}", settings, address, data, set_, verbose)


@app.command()
def sharpness(
    study: Folder,
    samples: Annotated[int, typer.Option(min=2, help="training images that are measured on; all if fewer")] = 1000,
    repeats: Annotated[int | None, typer.Option(min=1, help="confirmed runs of each cell; default: all")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of samples, probes and draws")] = 0,
    address: Address = None, data: Data = None, set_: Sets = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """How sharp the confirmed runs' solutions are: Hessian, Keskar's measure, SAM's. Run again, it does what is
    missing."""
    from lbstudy.analysis.minima import compute as minima
    from lbstudy.analysis.minima.sharpness import SharpnessSpec

    folder = StudyFolder.open(study)
    settings = SharpnessSpec(samples=samples, seed=seed)
    tasks = minima.sharpness_tasks(minima.best_runs(folder, repeats), settings)
    _compute(folder, study, tasks, "sharpness", settings, address, data, set_, verbose)


@app.command()
def noise(
    study: Folder,
    samples: Annotated[int, typer.Option(min=1, help="training samples, at each size of mini-batches")] = 4096,
    sizes: Annotated[list[int] | None, typer.Option("--size", min=1, help="of mini-batches; may be repeated; default: "
        "64, 128, 256")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="confirmed runs of each cell; default: all")] = None,
    address: Address = None, data: Data = None, set_: Sets = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """The noise of the gradient at the confirmed runs' solutions, and along the first seeds' training. Run again, it
    does what is missing."""
    from lbstudy.analysis.minima import compute as minima
    from lbstudy.analysis.minima.noise import NoiseSpec

    folder = StudyFolder.open(study)
    settings = NoiseSpec(samples=samples, **({"batch_sizes": tuple(sorted(set(sizes)))} if sizes else {}))
    tasks = minima.noise_tasks(folder, minima.best_runs(folder, repeats), settings)
    _compute(folder, study, tasks, "noise", settings, address, data, set_, verbose)


def _compute(
    folder: StudyFolder, study: str, tasks: Sequence[Task], where: str, settings: Spec, address: str | None,
    data: str | None, sets: list[str] | None, verbose: bool,
) -> None:  # fmt: skip
    """Compute on Ray what is missing of the tasks."""
    from lbstudy.analysis.minima import compute as minima

    spec, source = resolve(study, None, None, None, None, data, sets)
    folder.require_extension(spec)
    minima.keep_settings(folder, where, settings)
    failures: list[str] = []
    if missing := minima.missing(folder, tasks):
        require_room(spec, address, workers=1)
        images = load_data(spec, source, folder.path)
        with ended_in_order(folder.path, "the same command"):
            work = partial(compute_tasks, spec, folder, missing, where, images, failures)
            on_ray(work, folder.path, verbose)
    for failure in failures:
        err.print(f"failed: {failure}")
    print(f"{len(tasks) - len(failures)} of {len(tasks)} results in {folder.path / where}")
    raise typer.Exit(1 if failures else 0)


@app.command("doctor")
def examine(
    file: Annotated[str | None, typer.Argument(help="a study that shall run here")] = None,
    storage: Storage = "studies", address: Address = None,
) -> None:  # fmt: skip
    """Check Ray, its nodes and the storage, and whether a study fits; exit code 2 if something is wrong."""
    study, images = None, None
    if file is not None:
        study, source = resolve(file, None, None, None, None, None, None)
        images = load_data(study, source)
        for sentence in described(study, images):
            out.print(sentence, highlight=False, soft_wrap=True)
    folder = locate(storage)
    set_address(address)
    from lbstudy.tuning import doctor

    failed = False
    for finding in doctor.examine(study, images, folder):
        mark = ("✓", "green") if finding.ok else ("✗", "red")
        out.print(Text.assemble(mark, f" {finding.name}: {finding.sentence}"), highlight=False, soft_wrap=True)
        failed |= not finding.ok
    raise typer.Exit(2 if failed else 0)


@app.command()
def unlock(
    study: Folder,
    force: Annotated[bool, typer.Option("--force", help="even if its driver is alive, which then stops")] = False,
) -> None:
    """Take the lock of a study away from a driver that has died where nobody can tell: on a machine that is gone."""
    from lbstudy.records import lock

    folder = StudyFolder.open(real_path(locate(study)))
    removed = lock.unlock(folder.path, notice, force)
    print(f"{folder.path}: {'the lock is removed' if removed else 'there is no lock'}")


@app.command()
def schema() -> None:
    """The JSON Schema of the study file, for editors; `search_spaces/study.schema.json` is a copy."""
    from lbstudy.methods.configure import full_study_class
    from lbstudy.study.schema import file_schema

    print(json.dumps(file_schema(full_study_class()), indent=2))
