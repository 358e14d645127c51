"""A whole study on one Ray: its cells tuned, the best of each confirmed, the minima looked at, the report written.

`lbstudy all` and `lbstudy demo` are this, with what they ask for. Each part does what is missing of it, with the
settings of what lies in the study's folder already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from lbstudy.console.results import TableFormat, print_best
from lbstudy.console.session import compute_tasks, confirm_runs, exit_with, notice, run_study, tune
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.storage import StoragePath
from lbstudy.study.file import NothingYet, StudyFile
from lbstudy.study.run import Spec
from lbstudy.study.spec import StudySpec
from lbstudy.tuning.confirm import plan_runs, trained_on

if TYPE_CHECKING:
    from lbstudy.analysis.minima.compute import Kind, LandscapeSettings, Task
    from lbstudy.analysis.minima.sharpness import SharpnessSpec
    from lbstudy.training.datasets import Datasets


@dataclass(frozen=True)
class Evidence:
    """What there shall be besides the tuned cells."""

    landscapes: LandscapeSettings  # of lines and interpolations
    sharpness: SharpnessSpec
    seeds: int = 5  # confirmed runs of each configuration
    published: bool = False  # whether the published configurations are confirmed too
    looks_at: Callable[[TrialRecord], bool] = lambda run: True  # at the minima of which confirmed runs


def whole_study(
    study: StudySpec, source: StudyFile, path: StoragePath, wanted: Evidence, address: str | None, command: str,
    verbose: bool, hint: str = "",
) -> NoReturn:  # fmt: skip
    """Do what is missing of a study, from its tuning to its report, and print what was found.

    Args:
        study: the study.
        source: the file that it comes from.
        path: of its folder, which may not exist yet.
        wanted: what there shall be in the end.
        address: of a Ray cluster, if it runs on one.
        command: to go on with, should something be missing in the end.
        verbose: let Ray print.
        hint: a line to end with.

    Raises:
        StudyError: it cannot be done; said before any work begins.
        typer.Exit: in the end, with the exit code.
    """
    from lbstudy.analysis.minima import compute as minima

    folder, train_on = StudyFolder(path), trained_on(StudyFolder(path))
    looks = list(_looks(folder, wanted))
    runs, failures = list[TrialRecord](), list[str]()

    def work(data: Datasets) -> None:
        tuned = tune(study, path, data, verbose)
        try:
            runs.extend(plan_runs(folder, tuned, wanted.seeds, 1, wanted.published, train_on, notice))
            confirm_runs(tuned, folder, runs, train_on, data, verbose)
            around = [run for run in minima.best_runs(folder) if wanted.looks_at(run)]
        except NothingYet as error:
            notice(str(error))
            return
        for where, settings, find in looks:
            try:
                tasks = find(around)
            except NothingYet as error:  # too many cells without a solution
                notice(str(error))
                continue
            minima.keep_settings(folder, where, settings)
            if missing := minima.missing(folder, tasks):
                compute_tasks(tuned, folder, missing, where, data, failures)

    run_study(study, source, path, address, command, work, verbose)
    from lbstudy.analysis.report import page as report  # imports matplotlib and scipy

    print_best(folder, TableFormat.table)
    found = report.collect(folder)
    print("\n" + "\n".join(report.in_short(found)))
    print(f"\nreport: {report.write(folder, report=found)}")
    if hint:
        print(hint)
    wanted_runs = {(run.cell, run.number) for run in runs}
    confirmed = [run for run in folder.confirmation.trials() if (run.cell, run.number) in wanted_runs]
    count = len(study.list_cells()) * study.tuning.trials + len(runs)
    exit_with([*folder.trials(), *confirmed], count, command, failures)


def _looks(
    folder: StudyFolder, wanted: Evidence
) -> Iterator[tuple[str, Spec, Callable[[Sequence[TrialRecord]], list[Task]]]]:
    """What is computed of minima: where it lies in the study's folder, with which settings, and the tasks that are to
    be done on confirmed runs."""
    from lbstudy.analysis.minima import compute as minima

    kinds: tuple[Kind, ...] = ("line", "interpolate")
    for kind in kinds:
        where = f"landscape/{kind}"
        landscapes = minima.kept_settings(folder, where, wanted.landscapes)
        yield where, landscapes, partial(minima.landscape_tasks, folder, kind, settings=landscapes)
    sharpness = minima.kept_settings(folder, "sharpness", wanted.sharpness)
    yield "sharpness", sharpness, partial(minima.sharpness_tasks, settings=sharpness)
