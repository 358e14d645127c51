"""Which runs confirm a study: each cell's best configurations again, with fresh seeds and the whole budget.

A tuned best value is optimistic: it is the luckiest of many. A confirmed run repeats a tuning trial's configuration
with a seed that no trial has used, the same seeds in every cell, so that cells can be compared in pairs. Only these
runs evaluate the test set, and nothing is chosen by it. They lie in the study's folder, in `confirm`, as records like
any others. This module imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lbstudy.parallel.randomness import derive_seed
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord, ranked
from lbstudy.study.file import NothingYet, StudyError
from lbstudy.study.run import TrainOn
from lbstudy.study.spec import Cell, StudySpec


def trained_on(folder: StudyFolder) -> TrainOn:
    """Which samples the confirmed runs of a study train on: as those do that are there."""
    return next((run.run["train_on"] for run in folder.confirmation.trials()), "split")


def plan_runs(
    folder: StudyFolder,
    study: StudySpec,
    seeds: int,
    top: int,
    published: bool,
    train_on: TrainOn,
    notice: Callable[[str], None],
) -> list[TrialRecord]:
    """All runs that shall be in the study's `confirm` folder: those that are there, and those still missing.

    Args:
        folder: the study's folder.
        study: the study.
        seeds: runs of each configuration.
        top: configurations of each cell, best first.
        published: the published configurations too.
        train_on: the tuning split, or all training samples.
        notice: is told of cells that have nothing to confirm.

    Returns:
        The runs in the order in which they should be run: the first seed of every cell comes first.

    Raises:
        NothingYet: no cell has a completed trial.
        StudyError: the folder holds runs on other training samples.
    """
    present = folder.confirmation.trials()
    if other := next((run for run in present if run.run["train_on"] != train_on), None):
        raise StudyError(
            f"{folder.confirmation.path} holds runs with --train-on {other.run['train_on']}, which do not compare with "
            f"--train-on {train_on}; remove the folder, or keep to the former"
        )
    trials = folder.trials()
    chosen: list[tuple[Cell, TrialRecord]] = []
    for cell in study.list_cells():
        of_cell = [trial for trial in trials if trial.cell == cell.name]
        best = ranked(of_cell, study)[:top]
        if not best:
            notice(f"{cell.name} has no completed trial: nothing to confirm")
        chosen += [(cell, trial) for trial in best]
        if published:
            chosen += [(cell, trial) for trial in of_cell if trial.published and trial not in best]
    if not chosen:
        raise NothingYet(f"{folder.path}: no trial has completed yet, so there is nothing to confirm")
    known = {(run.cell, run.trial, run.repeat): run for run in present}
    taken = {cell.name: {run.number for run in present if run.cell == cell.name} for cell in study.list_cells()}
    runs = []
    for repeat in range(seeds):
        for cell, trial in chosen:
            run = known.get((cell.name, trial.number, repeat))
            if run is None:
                number = next(n for n in range(len(taken[cell.name]) + 1) if n not in taken[cell.name])
                taken[cell.name].add(number)
                run = _new_run(study, cell, trial, number, repeat, train_on)
            runs.append(run)
    return runs


def _new_run(
    study: StudySpec, cell: Cell, trial: TrialRecord, number: int, repeat: int, train_on: TrainOn
) -> TrialRecord:
    from lbstudy.methods.configure import run_spec  # imports torch, which those who only look at results do not need

    seed = derive_seed(study.seed, "confirm", repeat)
    # to the end of the budget, past a target too: curves and test accuracies are those of runs of one length
    whole = {"train_on": train_on, "evaluate": "all", "until_target": False}
    run = run_spec(study, cell, trial.params, seed).model_copy(update=whole)
    return TrialRecord(
        cell.name, number, cell.optimizer, cell.batch_size, cell.smoothing, trial.params, seed,
        run.model_dump(mode="json"), trial.published, trial=trial.number, repeat=repeat,
        factors=dict(cell.factors),
    )  # fmt: skip


def as_study(study: StudySpec, runs: Sequence[TrialRecord]) -> StudySpec:
    """The study whose trials these runs are."""
    return repeated(study, 1 + max(run.number for run in runs))


def repeated(study: StudySpec, count: int) -> StudySpec:
    """The study with so many runs of each cell, of which nothing is pruned, and every final model is kept."""
    tuning = study.tuning.model_copy(update={"pruner": "none", "trials": count})
    if study.tuning.target is not None:
        tuning = tuning.model_copy(update={"metric": "val_accuracy", "direction": "maximize", "target": None})
    resources = study.resources.model_copy(update={"keep_best": count})
    return study.model_copy(update={"tuning": tuning, "resources": resources})
