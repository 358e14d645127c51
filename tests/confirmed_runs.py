"""Studies with confirmed runs, constructed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lbstudy.analysis import load
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import Status
from lbstudy.study.spec import StudySpec
from tests.conftest import TINY_STUDY
from tests.records.test_folder import record

PARAMS = {"learning_rate": 0.1, "mixup_alpha": 0.5, "noise_magnitude": 0.01}

Curve = Sequence[Mapping[str, float]]
"""A run's metrics, an entry per epoch."""


def study_of(
    optimizers: Sequence[str], batch_sizes: Sequence[int], smoothings: Sequence[str], **changes: object
) -> StudySpec:
    """The tiny study with these cells."""
    cells = {"optimizer": optimizers, "batch_size": batch_sizes, "smoothing": smoothings, "exclude": []}
    cells |= {key: changes.pop(key) for key in ("exclude",) if key in changes}
    return StudySpec.model_validate({**TINY_STUDY, "cells": cells, "published": [], **changes})


def add_run(
    folder: StudyFolder, cell: str, curve: Curve, number: int = 0, status: Status = "completed", trial: int | None = None,
    **changes: object,
) -> None:  # fmt: skip
    """Write a trial, or a confirmed run of `trial` whose repeat is its number unless another one is given."""
    optimizer, batch_size, smoothing, *_ = cell.split("-")  # further factors are among the changes
    run = record(
        cell=cell, optimizer=optimizer, batch_size=int(batch_size[1:]), smoothing=smoothing, number=number,
        status=status, trial=trial, metrics={"epoch": len(curve), **curve[-1]},
        **({"repeat": 0 if trial is None else number} | changes),
    )  # fmt: skip
    folder = folder if trial is None else folder.confirmation
    folder.write_trial(run)
    for epoch, metrics in enumerate(curve, start=1):
        folder.append_epoch(run, {"epoch": epoch, "step": 10 * epoch, "seconds": 2.0, **metrics})


def confirmed_study(path: Path, study: StudySpec, accuracies: Mapping[str, Sequence[float]]) -> StudyFolder:
    """A study whose cells each have a completed trial, and confirmed runs with these test accuracies (NaN: diverged)."""
    folder = StudyFolder.create(path, study)
    factors = {cell.name: dict(cell.factors) for cell in study.list_cells()}
    for name, values in factors.items():
        add_run(folder, name, [{"val_accuracy": 0.9, "val_loss": 0.3}], params=PARAMS, factors=values)
    for cell_name, values in accuracies.items():
        for repeat, accuracy in enumerate(values):
            status: Status = "diverged" if accuracy != accuracy else "completed"
            metrics = [{"test_accuracy": accuracy}]
            add_run(folder, cell_name, metrics, repeat, status, trial=0, factors=factors[cell_name])
    return folder


def confirmed_frame(path: Path, study: StudySpec, accuracies: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """The confirmed runs of such a study."""
    return load.confirmed(confirmed_study(path, study, accuracies))
