"""What the commands share: a study's file and data read, Ray joined or started, the work done and ended in order.

Everything here talks to the terminal; what it calls does not. Exit codes: 0 done, 1 some trials failed or are missing,
2 bad input, 130 and 143 interrupted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from shlex import quote
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import track as rich_track

from lbstudy import trackers
from lbstudy.console.interrupt import Interrupted, interruptible
from lbstudy.console.progress import Progress, TaskProgress
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.storage import StoragePath, locate
from lbstudy.study import split
from lbstudy.study.file import KeyProblems, StudyError, StudyFile, parse_override
from lbstudy.study.load import find_study
from lbstudy.study.run import TrainOn
from lbstudy.study.spec import StudySpec
from lbstudy.trackers.follow import followed
from lbstudy.tuning.confirm import as_study, plan_runs

if TYPE_CHECKING:
    from lbstudy.analysis.minima.compute import Task
    from lbstudy.study.code import Code
    from lbstudy.training.datasets import Datasets

TARGET_SEEDS = 3
"""Confirmed runs of the plain small-batch cell that a target `auto` is taken from."""

err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def resolve(
    file: str, name: str | None, trials: int | None, epochs: int | None, workers: int | None, data: str | None,
    sets: list[str] | None, track: Sequence[str] | None = None,
) -> tuple[StudySpec, StudyFile]:  # fmt: skip
    """The study that a command's arguments describe, and the file that it comes from."""
    overrides = dict(parse_override(text) for text in sets or [])
    flags = {
        "name": name,
        "tuning.trials": trials,
        "budget": None if epochs is None else {"epochs": epochs},
        "resources.workers": workers,
        "dataset.root": data,
        "resources.track": list(map(str, track)) if track else None,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    from lbstudy.methods.checks import check_study  # imports torch

    source = StudyFile(find_study(file), overrides)
    study = check_study(source, written_by_hand=not locate(file).is_dir())
    if data is not None and not any(part.dataset.has_files for part in study.variants()):
        raise StudyError(f"--data {data}: the study's data, {study.dataset.name}, are in no files")
    if study.dataset.root is not None and {"dataset", "dataset.root"}.isdisjoint(study.factors):
        placed = study.dataset.model_copy(update={"root": _from_anywhere(study.dataset.root)})
        study = study.model_copy(update={"dataset": placed})
    return study, source


def _from_anywhere(root: str) -> str:
    """A folder as it can be found from any other: the study may go on in another one than it began in."""
    expanded = os.path.expanduser(root)
    return root if expanded.startswith("~") else os.path.abspath(expanded)  # without a home, reading it says so


def code_in_use() -> Code:
    """The user's code of the study that `resolve` has found."""
    from lbstudy.methods.user_code import active  # imports torch

    return active()


def set_address(address: str | None) -> None:
    """Before Ray is imported: it decides on authentication then."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address


def load_data(study: StudySpec, source: StudyFile, path: StoragePath | None = None) -> Datasets:
    """Read a study's data and make sure that they, its methods and its mini-batches fit each other.

    Args:
        study: the study.
        source: the file that it comes from.
        path: its folder; where it has one already, it must have run on the same data, and other versions are told.
    """
    from lbstudy.training import datasets

    data = read_data(study, source)
    if path is not None and (path / "study.yaml").is_file():
        folder = StudyFolder(path)
        if not folder.require_same_data(datasets.identities(study, data)):
            notice(f"{path} does not say which data it has run on: those of now are taken for them")
        if others := folder.other_versions():
            notice(f"{path} has run with other versions, which may change results: {'; '.join(others)}")
    fit(study, source, data)
    return data


def read_data(study: StudySpec, source: StudyFile) -> Datasets:
    """Read a study's data."""
    from lbstudy.training import datasets, own_data

    with _placed(source):
        return datasets.load_all(study, _track, own_data.load)


def fit(study: StudySpec, source: StudyFile, data: Datasets) -> None:
    """Make sure that a study's methods, data and mini-batches fit each other; those that are not ours are tried."""
    from lbstudy.training import fitting

    with _placed(source):
        fitting.check(study, data)
        fitting.try_on(study, data)


@contextmanager
def _placed(source: StudyFile) -> Iterator[None]:
    """Problems within it get the file and the lines."""
    try:
        yield
    except KeyProblems as error:
        raise source.error(error.problems) from error


def run_study(
    study: StudySpec, source: StudyFile, path: StoragePath, address: str | None, command: str,
    work: Callable[[Datasets], object], verbose: bool,
) -> None:  # fmt: skip
    """Work on a study at this path with its data, on Ray, after all that can be wrong has been looked at.

    Args:
        study: the study.
        source: the file that it comes from.
        path: of its folder, which may not exist yet.
        address: of a Ray cluster, if it runs on one.
        command: to go on with, should somebody interrupt it.
        work: what to do on the connected Ray.
        verbose: let Ray print.
    """
    from lbstudy.methods.checks import notices  # imports torch

    trackers.require(study.resources.track)
    for message in notices(study):
        notice(message)
    if left_out := study.left_out():
        err.print(f"left out by cells.exclude: {', '.join(cell.name for cell in left_out)}")
    with ended_in_order(path, command):
        StudyFolder.check(path, study, code_in_use())
        require_room(study, address)
        data = load_data(study, source, path)
        with DriverLock(path, notice):
            on_ray(lambda: work(data), path, verbose)


def again(command: str, address: str | None) -> str:
    """The command to go on with: on the same cluster."""
    address = address or os.environ.get("RAY_ADDRESS")
    return f"{command} --address {quote(address)}" if address else command


@contextmanager
def ended_in_order(path: StoragePath, command: str) -> Iterator[None]:
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


def require_room(study: StudySpec, address: str | None, workers: int | None = None) -> None:
    """Whether this machine can hold a trial, or other work of so many workers, is known long before a private Ray is
    up.

    Raises:
        StudyError: it cannot.
    """
    from lbstudy.tuning.resources import count_lanes, this_machine, with_gpus

    set_address(address)
    if "RAY_ADDRESS" not in os.environ:
        machine = [this_machine()]
        resources = study.resources.model_copy(update={"workers": workers or study.resources.workers})
        count_lanes(with_gpus(resources, machine), machine)


def exit_with(trials: Sequence[TrialRecord], count: int, command: str, failures: Sequence[str] = ()) -> NoReturn:
    """Say what has failed and what is missing of so many trials, and with which command to go on.

    Args:
        trials: that there are.
        count: that there shall be.
        command: which does what is missing.
        failures: what else has failed, and why.

    Raises:
        typer.Exit: with code 1 where anything has failed or is missing, else 0.
    """
    for failure in failures:
        err.print(f"failed: {failure}")
    if failed := [t for t in trials if t.status == "failed"]:
        err.print(f"{len(failed)} trials failed; the first one, {failed[0].cell} trial {failed[0].number}, with:")
        err.print(failed[0].error.strip().splitlines()[-1])
    missing = count - sum(t.status in FINISHED for t in trials)
    if missing:
        err.print(f"{missing} trials are missing; to go on: {command}")
    raise typer.Exit(1 if failed or missing or failures else 0)


def tune(study: StudySpec, path: StoragePath, data: Datasets, verbose: bool) -> StudySpec:
    """Run what is missing on the connected Ray; returns the study with its target and resources decided."""
    from lbstudy.training import datasets
    from lbstudy.tuning import doctor, tuner

    if study.tuning.target == "auto":
        study = with_target(study, path, data, verbose)
    doctor.clean_up(notice)
    planned = tuner.plan_when_there_is_room(study, data, notice)
    doctor.require(doctor.before_a_run(planned, path))
    folder = StudyFolder.create(path, planned.study, code_in_use())
    folder.keep_data(datasets.identities(study, data))
    cells = len(planned.epochs)
    err.print(f"{cells} cells x {study.tuning.trials} trials on {in_lanes(planned.lanes)}; records in {path}")
    with followed(folder, study.resources.track, notice), Progress(study, err) as progress:
        tuner.tune_study(folder, planned, progress.update, notice, verbose, progress.take_up)
    return planned.study


def with_target(study: StudySpec, path: StoragePath, data: Datasets, verbose: bool) -> StudySpec:
    """The study with the target that it has asked to be found: the validation accuracy that the worst of TARGET_SEEDS
    runs of its plain small-batch cell ends with, which is tuned for accuracy in a study of its own, within its folder.

    Raises:
        StudyError: no run of that cell completes.
    """
    from lbstudy.analysis import load
    from lbstudy.analysis.tables import targets

    folder = StudyFolder.create(path, study, code_in_use())
    if folder.study().tuning.goal is None:
        first = targets.baseline(study)
        only: dict[str, Any] = {key: [getattr(first, key)] for key in ("optimizer", "batch_size", "smoothing")}
        if any(part.splits for part in study.variants()):
            only |= {split.KEY: {split.SAME_EPOCHS: study.factors[split.KEY][split.SAME_EPOCHS]}}
        tuning = {"metric": "val_accuracy", "direction": "maximize", "target": None, "learning_rate_rule": None}
        plain = study.model_copy(
            update={
                "cells": study.cells.model_copy(update=only),
                "tuning": study.tuning.model_copy(update=tuning),
                "evaluate_every": None,
            }
        )
        where = folder.target
        err.print(f"the target is what {first.name} reaches, tuned for accuracy first; records in {where.path}")
        tune(plain, where.path, data, verbose)
        runs = plan_runs(where, plain, TARGET_SEEDS, 1, False, "split", notice)
        confirm_runs(plain, where, runs, "split", data, verbose)
        found = [targets.choose_targets(part, load.confirmed(where))[1].value for part in plain.variants()]
        if any(map(isnan, found)):
            raise StudyError(f"{where.path}: no confirmed run of {first.name} has completed, so there is no target")
        folder.fix_target(study, min(found), code_in_use())
    goal = folder.study().tuning.goal
    err.print(f"the target is {goal}")
    return study.aimed_at(goal)


def confirm_runs(
    study: StudySpec, folder: StudyFolder, runs: Sequence[TrialRecord], train_on: TrainOn, data: Datasets,
    verbose: bool,
) -> None:  # fmt: skip
    """Run what is missing of the confirmed runs on the connected Ray."""
    from lbstudy.tuning import doctor, tuner

    where = folder.confirmation
    doctor.clean_up(notice)
    planned = tuner.plan_when_there_is_room(as_study(study, runs), data, notice, train_on)
    doctor.require(doctor.before_a_run(planned, where.path))
    StudyFolder.create(where.path, study)
    err.print(f"{len(runs)} confirming runs on {in_lanes(planned.lanes)}; records in {where.path}")
    progress = Progress(planned.study, err, Counter(run.cell for run in runs))
    with followed(folder, study.resources.track, notice), progress:
        tuner.confirm_runs(where, planned, runs, progress.update, notice, verbose, progress.take_up)


def compute_tasks(
    study: StudySpec, folder: StudyFolder, tasks: Sequence[Task], where: str, data: Datasets, failures: list[str]
) -> None:
    """Compute tasks on the connected Ray; adds to `failures` what has failed and why."""
    from lbstudy.analysis.minima import compute as minima

    with TaskProgress(where, len(tasks), err) as progress:

        def failed(task: Task, reason: str) -> None:
            failures.append(f"{task.result}: {reason}")
            progress.advance()

        minima.compute(folder, study, data, tasks, lambda task: progress.advance(), failed, notice)


def on_ray(work: Callable[[], object], path: StoragePath | None = None, verbose: bool = False) -> None:
    """Join or start Ray, and work, on the study at this path if it is on one."""
    from lbstudy.tuning import tuner

    err.print("joining the cluster ..." if "RAY_ADDRESS" in os.environ else "starting Ray ...")
    in_order = False
    try:
        tuner.connect(verbose)
        try:
            work()
            in_order = True
        except OSError as error:
            if path is None:
                raise
            raise StudyError(
                f"{path}: {error.strerror or error}; what has finished is safe, and the same command goes on"
            ) from error
    except KeyboardInterrupt:
        err.print("ending the trials at work; once more to leave at once")
        raise
    finally:
        tuner.disconnect(in_order)


def in_lanes(count: int) -> str:
    """So many lanes, in words."""
    return f"{count} lane{'s' * (count != 1)}"


def notice(message: str) -> None:
    """Tell the user something that is no error."""
    err.print(f"notice: {message}")


def _track(images: Iterable[Any], count: int, doing: str) -> Iterable[Any]:
    return rich_track(images, doing, total=count, console=err)
