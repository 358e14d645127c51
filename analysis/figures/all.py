"""All figures of a study that can be drawn, each with its name and a description; and why the others cannot.

The figures themselves: `figures_runs` (learning curves, steps to a target), `figures_tuning` (sensitivity, learning
rates, tuning curves), `figures_mixup`, `figures_landscape` (lines), `figures_planes`, `figures_noise`,
`figures_sharpness`. How they look: `style`.

Colour, line style and marker tell optimizer, batch size and smoothing apart. Where a study has further factors, every
figure is drawn for each of its variants, all cells of which share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import isnan
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lbstudy.analysis import load
from lbstudy.analysis.figures import accuracy as figures_accuracy
from lbstudy.analysis.figures import gaps as figures_gaps
from lbstudy.analysis.figures import landscape as figures_landscape
from lbstudy.analysis.figures import mixup as figures_mixup
from lbstudy.analysis.figures import noise as figures_noise
from lbstudy.analysis.figures import planes as figures_planes
from lbstudy.analysis.figures import runs as figures_runs
from lbstudy.analysis.figures import sharpness as figures_sharpness
from lbstudy.analysis.figures import style
from lbstudy.analysis.figures import tuning as figures_tuning
from lbstudy.analysis.figures.split import draw_split, split_info
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.minima import results
from lbstudy.analysis.tables import gaps, targets
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StoragePath
from lbstudy.study.factors import suffix
from lbstudy.study.file import StudyError, writing
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import without_budget
from lbstudy.training import datasets


class Drawing(NamedTuple):
    """A figure, or why there is none."""

    name: str  # also of its file
    description: str
    figure: Figure | None
    reason: str = ""  # where there is no figure
    kind: str = ""  # the name without that of the variant


class Reached(NamedTuple):
    """When each run reached a target."""

    target: str  # in words: what was to be reached
    runs: pd.DataFrame  # a row per run: see `figures_runs.steps_to_target_info`


class Frames(NamedTuple):
    """What the figures are drawn from, of a study or one of its variants."""

    study: StudySpec
    trials: pd.DataFrame
    epochs: pd.DataFrame
    runs: pd.DataFrame  # confirmed
    confirmed: pd.DataFrame  # their epochs
    landscape: Callable[[results.Kind], pd.DataFrame]
    sharpness: Callable[[], pd.DataFrame]
    noise: Callable[[], pd.DataFrame]


Figures = dict[str, tuple[str, Callable[[], Figure]]]
"""Name -> description, and what draws it."""


def draw_all(
    folder: StudyFolder, reached: Reached | None = None, at_most: int | None = None, rows: int | None = None
) -> Iterator[Drawing]:
    """Draw the figures of a study, in the order of a report; of each, one per variant of the study.

    Args:
        folder: the study's folder.
        reached: for the steps to a target; default: the target that the study was tuned for, or else the training
            loss that `targets.choose_targets` takes from the baseline cell.
        at_most: variants that are drawn of each figure, the first ones, and none that splits gaps; of the others the
            reason says how to.
        rows: variants that a figure of all of them shows at most.
    """
    folder = load.Snapshot.of(folder)
    study = folder.study()
    frames = Frames(
        study, load.trials(folder), load.epochs(folder), load.confirmed(folder), load.confirmed_epochs(folder),
        partial(results.landscape, folder), partial(results.sharpness, folder), partial(results.noise, folder),
    )  # fmt: skip
    variants = study.variants()
    if any(part.splits for part in variants):
        yield from _draw_splits(study, frames.runs)
    parts: list[tuple[Figures, str, str, bool]]
    if len(variants) == 1:
        parts = [(figures_of(folder, frames, reached), "", "", False)]
    else:
        parts = [
            (
                figures_of(folder, _narrowed(frames, part), reached),
                suffix(part.list_cells()[0].factors),
                part.in_words,
                part.splits is not None,
            )
            for part in variants
        ]
    for name, (description, draw) in figures_of_all(frames, rows).items():
        yield _drawn(name, name, description, draw)
    for name in dict.fromkeys(name for figures, _, _, _ in parts for name in figures):
        of_name = [(figures[name], end, words, splits) for figures, end, words, splits in parts if name in figures]
        for place, ((description, draw), end, words, splits) in enumerate(of_name):
            caption = f"{description}, with {words}" if words else description
            if at_most is not None and (place >= at_most or splits):
                reason = "left to `lbstudy figures`, with so many combinations"
                yield Drawing(name + end, caption, None, reason, name)
            else:
                yield _drawn(name, name + end, caption, draw)


def _drawn(kind: str, name: str, description: str, draw: Callable[[], Figure]) -> Drawing:
    try:
        return Drawing(name, description, draw(), kind=kind)
    except NothingToDraw as nothing:
        return Drawing(name, description, None, str(nothing), kind)


def _draw_splits(study: StudySpec, runs: pd.DataFrame) -> Iterator[Drawing]:
    """The gaps and their parts, which are of several variants: a figure for each whose gaps are split."""
    for part in study.compared():
        words = f", with {part.in_words}" if part.in_words else ""
        name = f"split{suffix(without_budget(part.list_cells()[0].factors))}"
        description = f"What few updates and what less noise cost the large batch{words}"
        yield _drawn("split", name, description, lambda part=part: draw_split(split_info(study, runs, _named(part))))  # type: ignore[misc]


def _named(part: StudySpec) -> StudySpec:
    """A variant under a name that says which one it is."""
    return part.model_copy(update={"name": ", ".join(filter(None, [part.name, part.in_words]))})


def _narrowed(frames: Frames, part: StudySpec) -> Frames:
    """The frames of one variant of the study, whose name in the headings says which."""
    return Frames(
        study=_named(part),
        trials=load.of_variant(frames.trials, part),
        epochs=load.of_variant(frames.epochs, part),
        runs=load.of_variant(frames.runs, part),
        confirmed=load.of_variant(frames.confirmed, part),
        landscape=lambda kind: load.of_variant(frames.landscape(kind), part),
        sharpness=lambda: load.of_variant(frames.sharpness(), part),
        noise=lambda: load.of_variant(frames.noise(), part),
    )


def figures_of_all(frames: Frames, rows: int | None = None) -> Figures:
    """The figures that show all variants of a study at once; of so many of them at most."""
    study, trials, runs = frames.study, frames.trials, frames.runs
    table = cache(lambda: gaps.gap_table(study, runs))
    return {
        "accuracy": (
            "Test accuracy against batch size",
            lambda: figures_accuracy.draw_accuracy(figures_accuracy.accuracy_info(study, trials, runs), rows),
        ),
        "gap": (
            "What the largest batch size loses against the smallest",
            lambda: figures_gaps.draw_gaps(figures_gaps.gaps_info(study, table()), rows),
        ),
        "gap_closed": (
            "How much of that loss each smoothing takes away",
            lambda: figures_gaps.draw_shares(figures_gaps.shares_info(study, table()), rows),
        ),
    }


def figures_of(folder: StudyFolder, frames: Frames, reached: Reached | None) -> Figures:
    """All figures of a study, or of one of its variants."""
    study, trials, epochs, runs, confirmed, landscape, sharpness, noise = frames
    on_all = bool(runs["train_on"].eq("all").any())

    @cache
    def curves() -> figures_runs.LearningCurves:
        return figures_runs.learning_curves_info(study, trials, epochs, confirmed, "all" if on_all else "split")

    def steps_to_target() -> Figure:
        found = reached or _reached_by_default(study, runs, confirmed)
        return figures_runs.draw_steps_to_target(figures_runs.steps_to_target_info(study, found.runs, found.target))

    def samples() -> Figure:
        densities = figures_mixup.mixup_densities_info(study, trials)
        return figures_mixup.draw_mixup_samples(figures_mixup.mixup_samples_info(densities, _images(study)))

    @cache
    def lines() -> figures_landscape.Curves:
        return figures_landscape.line_info(study, landscape("line"), results.landscape_settings(folder, "line"))

    @cache
    def planes() -> figures_planes.Planes:
        return figures_planes.plane_info(study, landscape("plane"), results.landscape_settings(folder, "plane"))

    def trajectories() -> Figure:
        found = figures_planes.trajectory_info(study, landscape("trajectory"), results.trajectories(folder))
        return figures_planes.draw_trajectory(found)

    @cache
    def minima() -> pd.DataFrame:
        return minima_table.runs(runs, sharpness(), landscape("line"))

    def densities() -> Figure:
        found = figures_sharpness.densities_info(study, minima(), results.spectral_densities(folder))
        return figures_sharpness.draw_densities(found)

    def sharpness_accuracy() -> Figure:
        table = minima_table.minima_table(study, minima())
        return figures_sharpness.draw_sharpness_accuracy(figures_sharpness.sharpness_accuracy_info(study, table))

    def sensitivity(parameter: str) -> Callable[[], Figure]:
        return lambda: figures_tuning.draw_sensitivity(figures_tuning.sensitivity_info(study, trials, parameter))

    what = study.tuning.metric.replace("_", " ") if study.tuning.goal else "validation accuracy"
    figures: list[tuple[str, str, Callable[[], Figure]]] = [
        ("learning_curves", "Accuracy and loss of every cell against epochs",
         lambda: figures_runs.draw_learning_curves(curves())),
        ("learning_curves_steps", "Accuracy and loss of every cell against optimizer steps",
         lambda: figures_runs.draw_learning_curves(curves(), "step")),
        ("steps_to_target", "Steps to a target against batch size, with ideal scaling and critical batch sizes",
         steps_to_target),
        ("best_learning_rates", "Best learning rate against batch size, with the linear and the square-root rule",
         lambda: figures_tuning.draw_best_rates(figures_tuning.best_rates_info(study, trials))),
        ("tuning_curves", f"Expected best {what} after k trials",
         lambda: figures_tuning.draw_tuning_curves(figures_tuning.tuning_curves_info(study, trials))),
        *((f"sensitivity_{name}", f"{what.capitalize()} of every trial against {name.replace('_', ' ')}",
           sensitivity(name)) for name in study.tuned()),
        ("mixup_densities", "Density of the Mixup coefficient in the best trial of every cell with Mixup",
         lambda: figures_mixup.draw_mixup_densities(figures_mixup.mixup_densities_info(study, trials))),
        ("mixup_samples", "Training images mixed by Mixup", samples),
        ("landscape_line", "Loss and accuracy around the minima of every cell, along random directions",
         lambda: figures_landscape.draw_line(lines())),
        ("landscape_widths", "Training loss around the minima, batch sizes and smoothings compared",
         lambda: figures_landscape.draw_widths(lines())),
        ("landscape_plane", "Contours of the training loss around the minima, on a plane of two random directions",
         lambda: figures_planes.draw_plane(planes())),
        ("landscape_surface", "The same planes in three dimensions", lambda: figures_planes.draw_surface(planes())),
        ("landscape_interpolate", "Loss and accuracy on the line from the small-batch to the large-batch solution",
         lambda: figures_landscape.draw_interpolation(
             figures_landscape.interpolation_info(study, landscape("interpolate")))),
        ("landscape_trajectory", "The path of a run over its training loss, on the plane that holds most of it",
         trajectories),
        ("noise_scale", "Gradient noise scale along training, with the batch sizes",
         lambda: figures_noise.draw_noise_scales(figures_noise.noise_scales_info(study, noise()))),
        ("spectral_densities", "Density of the Hessian's eigenvalues at the minima of every cell", densities),
        ("sharpness_accuracy", "Sharpness of the minima against test accuracy, a point per cell", sharpness_accuracy),
    ]  # fmt: skip
    return {name: (description, draw) for name, description, draw in figures}


def _reached_by_default(study: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame) -> Reached:
    target = targets.choose_targets(study, confirmed)[0]
    if isnan(target.value):
        raise NothingToDraw(f"no target: no confirmed run of {targets.baseline(study).name} has completed")
    return Reached(str(target), targets.winners_times(confirmed, epochs, target))


def _images(study: StudySpec) -> NDArray[np.uint8]:
    """Training images, where this machine has them and what reading them needs."""
    try:
        return datasets.load(study.dataset).train_images
    except (StudyError, ImportError) as error:  # ImportError: torchvision's files, and no torchvision here
        raise NothingToDraw(f"the images cannot be read here: {str(error).splitlines()[0]}") from error


def write_all(
    folder: StudyFolder, file_format: style.Format, reached: Reached | None = None
) -> Iterator[tuple[Drawing, StoragePath | None]]:
    """Write what can be drawn to STUDY/figures, a file each; yields each drawing with its file's path.

    Raises:
        StudyError: the folder cannot be written.
    """
    target = folder.path / "figures"
    with writing(target):
        target.mkdir(exist_ok=True)
        for drawing in draw_all(folder, reached):
            path: StoragePath | None = None
            if drawing.figure is not None:
                path = target / f"{drawing.name}.{file_format}"
                style.write(drawing.figure, path)
            yield drawing, path
