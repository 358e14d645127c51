"""What `lbstudy plan` says: the cells of a study, what each tunes, and what it would take here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lbstudy.console.session import code_in_use, fit, in_lanes, read_data
from lbstudy.console.terminal import out, print_table
from lbstudy.study import split
from lbstudy.study.file import StudyError, StudyFile, show
from lbstudy.study.spec import Cell, StudySpec

if TYPE_CHECKING:
    from lbstudy.training.datasets import Datasets

IMPORTING = ("plan", "doctor", "run", "all", "confirm", "landscape", "sharpness", "noise")
"""Commands that need the methods of a study, and so import a user's code."""


def described(study: StudySpec, data: Datasets) -> Iterator[str]:
    """What the data of a study are, in sentences."""
    from lbstudy.training import datasets, summary
    from lbstudy.training.residency import in_words
    from lbstudy.tuning.resources import this_machine, with_gpus

    gpus = bool(study.resources.gpus_per_worker)
    if study.resources.gpus_per_worker == "auto":
        gpus = bool(with_gpus(study.resources, [this_machine()]).gpus_per_worker)
    for key, part in {datasets.source(part.dataset): part for part in study.variants()}.items():
        if key in data:
            kept = in_words(part.dataset.residency, data[key].nbytes, gpus)
            for sentence in (*summary.summarise(data[key]).sentences(), kept):
                yield f"data: {sentence}" if len(data) == 1 else f"data, {part.dataset.name}: {sentence}"


def print_plan(study: StudySpec, source: StudyFile) -> Datasets:
    """Print it; returns the study's data.

    Raises:
        StudyError: the study cannot run: data are missing, or do not fit its methods. What is known without them is
            printed first, unless it is the user's own code that is at fault.
    """
    import pandas as pd

    from lbstudy.training import datasets
    from lbstudy.tuning.resources import count_lanes, this_machine, with_gpus

    names = study.tuned()
    images: Datasets = {}
    misfit: StudyError | None = None
    try:
        images = read_data(study, source)
        fit(study, source, images)
    except StudyError as error:
        own_data = any(part.dataset.function for part in study.variants())
        if own_data or (study.code and images):  # the user's to mend, and not this machine's
            raise
        misfit = error
    rows, parts = [], study.variants()
    for part in parts:
        known = images.get(datasets.source(part.dataset)) if misfit is None else None
        samples = datasets.training_samples(part.dataset, known) if known else None
        for cell in part.list_cells():
            ranges = part.ranges(cell)
            steps = str(part.steps_per_epoch(cell, samples)) if samples else "?"
            published = str(len(part.published_params(cell)) or "-")
            costs = _costs(part, cell, samples) if split.KEY in study.factors else {}
            rows.append((cell.name, steps, *costs.values(), *(str(ranges.get(name, "-")) for name in names), published))
    frame = pd.DataFrame(rows, columns=["cell", "steps_per_epoch", *costs, *names, "published"])
    models, sets = dict.fromkeys(str(part.model) for part in parts), dict.fromkeys(part.dataset.name for part in parts)
    print_table(frame, title=f"{study.name}: {' and '.join(models)} on {' and '.join(sets)}")
    if any(part.splits for part in parts):
        sizes = study.cells.batch_size
        twins = {split.SAME_UPDATES: min(sizes), split.FEWER_UPDATES: max(sizes)}
        once = [f"{name} at batch {twins[name]}" for name in study.factors[split.KEY] if name in twins]
        out.print(f"split: {' and '.join(once)} would be the run of {split.SAME_EPOCHS}, which is trained once")
    if left_out := study.left_out():
        out.print(f"left out by cells.exclude: {', '.join(cell.name for cell in left_out)}")
    for sentence in described(study, images):
        out.print(sentence, soft_wrap=True)
    tuning, resources, cells = study.tuning, study.resources, len(rows)
    lengths = " or ".join(dict.fromkeys(part.budget.in_words for part in parts))
    pruner = "no pruner" if tuning.pruner == "none" else (
        f"ASHA from epoch {tuning.pruner.grace_period}, one in {tuning.pruner.reduction_factor:g} passes a rung"
    )  # fmt: skip
    out.print(f"budget: {cells} cells x {tuning.trials} trials x at most {lengths}; {tuning.sampler}, {pruner}")
    every = f", evaluated every {study.evaluate_every} steps and at the ends of epochs" if study.evaluate_every else ""
    out.print(f"tuned for: {tuning.in_words}{every}")
    machine = this_machine()
    resources = with_gpus(resources, [machine])
    each = f"{resources.cpus_per_worker:g} CPU" + (
        f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    )
    try:
        lanes = f"{in_lanes(min(count_lanes(resources, [machine]), cells * tuning.trials))} on this machine"
    except StudyError as error:
        lanes = f"not on this machine: {error}"
    out.print(f"resources: {resources.workers} worker{'s' * (resources.workers != 1)} a trial, {each} each; {lanes}")
    varied = {key.removeprefix("fixed.") for key in study.factors} | set(study.search)  # ranges are in the table
    used = study.methods
    settings = {f"{m}.{k}": v for m, entry in study.fixed.settings.items() if m in used for k, v in entry.items()}
    fixed = study.fixed.numbers | {key: show(value) for key, value in settings.items() if value not in (None, [])}
    if study.code:
        checksums = [f"{path} (sha256 {checksum[:12]})" for path, checksum in code_in_use().checksums.items()]
        out.print(f"code: {', '.join(checksums)}", soft_wrap=True)
        out.print(f"  imported by {', '.join(IMPORTING)}; by no other command")
    out.print("fixed: " + ", ".join(f"{key} {value}" for key, value in fixed.items() if key not in varied))
    if misfit is not None:
        raise misfit
    return images


def _costs(part: StudySpec, cell: Cell, samples: int | None) -> dict[str, str]:
    """What a whole run of a cell comes to, in a variant of the study; `?` where its data are not here."""
    if samples is None:
        return dict.fromkeys(("steps", "epochs", "images"), "?")
    extent = part.extent(cell, samples)
    return {"steps": str(extent.steps), "epochs": str(extent.epochs), "images": str(extent.images())}
