"""Figures of Mixup: mixed images, and the distributions of the mixing coefficient, for the alphas in use.

lambda ~ Beta(alpha, alpha), and an image becomes lambda x_i + (1 - lambda) x_j (Zhang et al. 2018). Each figure is two
functions: `*_info` computes what is shown, `draw_*` draws it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lbstudy.analysis.figures.style import Encoding, NothingToDraw, in_style, label_outer, log_axis, mark_empty, panels
from lbstudy.analysis.tables.best import best_trials
from lbstudy.parallel.randomness import stream
from lbstudy.study.spec import Cell, StudySpec

PAIRS = 6
GRID = np.linspace(0.0, 1.0, 201)[1:-1]
"""Coefficients at which densities are drawn; at 0 and 1 those of alpha < 1 are infinite."""


class MixupDensities(NamedTuple):
    """The Beta(alpha, alpha) densities of the cells that use Mixup."""

    study: StudySpec
    alphas: pd.DataFrame
    """A row per cell with an alpha: cell, optimizer, batch_size, smoothing, alpha."""
    densities: pd.DataFrame
    """Index: the mixing coefficient lambda; a column per cell."""


def mixup_densities_info(study: StudySpec, trials: pd.DataFrame) -> MixupDensities:
    """Take the alpha of each cell's best trial, or the fixed one where it is not tuned.

    Raises:
        NothingToDraw: no cell uses Mixup, or none of those that do has an alpha yet.
    """
    cells = _with_mixup(study)
    if not cells:
        raise NothingToDraw("no cell uses Mixup")
    best = best_trials(study, trials).set_index("cell")
    rows = []
    for cell in cells:
        alpha = study.fixed.numbers.get("mixup_alpha")
        if "mixup_alpha" in study.ranges(cell):
            alpha = best["params.mixup_alpha"].get(cell.name) if "params.mixup_alpha" in best else None
        if alpha is not None and not np.isnan(alpha):
            rows.append((cell.name, cell.optimizer, cell.batch_size, cell.smoothing, float(alpha)))
    if not rows:
        raise NothingToDraw("no trial with Mixup has completed")
    alphas = pd.DataFrame(rows, columns=["cell", "optimizer", "batch_size", "smoothing", "alpha"])
    from scipy import stats  # here, since the import takes most of a second

    curves = {row.cell: stats.beta.pdf(GRID, row.alpha, row.alpha) for row in alphas.itertuples()}
    return MixupDensities(study, alphas, pd.DataFrame(curves, index=pd.Index(GRID, name="coefficient")))


def _with_mixup(study: StudySpec) -> list[Cell]:
    return [cell for cell in study.list_cells() if "mixup" in cell.smoothing.split("+")]


@in_style
def draw_mixup_densities(info: MixupDensities) -> Figure:
    """A panel per smoothing with Mixup, a curve per cell; the density's axis is logarithmic."""
    encoding = Encoding.of(info.study).only(_with_mixup(info.study))
    columns = encoding.smoothings
    figure, axes = panels(
        info.study.name, "density of the Mixup coefficient",
        f"Beta(α, α) with the α of each cell's best trial, n = {len(info.alphas)} cells. Small α: near 0 and 1, images "
        "hardly mixed.",
        [""], columns, width=2.6, height=2.1,
    )  # fmt: skip
    for panel, smoothing in zip(axes[0], columns, strict=True):
        here = info.alphas[info.alphas["smoothing"] == smoothing]
        for row in here.itertuples():
            look = encoding.look(str(row.optimizer), int(str(row.batch_size)), smoothing)
            density = info.densities[str(row.cell)]
            panel.plot(density.index, density, markevery=(20, 60), **look)
        if here.empty:
            mark_empty(panel, "no trial has completed")
        panel.set_xlim(0, 1)
        log_axis(panel, "y")
    label_outer(axes, "mixing coefficient λ", "density")
    encoding.legend(figure, ["optimizer", "batch size", "smoothing"])
    return figure


class MixupSamples(NamedTuple):
    """Pairs of training images, and what Mixup makes of them."""

    study: StudySpec
    first: NDArray[np.uint8]  # pairs x H x W x C
    second: NDArray[np.uint8]
    alphas: list[float]  # lowest, middle and highest in use
    coefficients: NDArray[np.float64]  # alphas x pairs
    mixed: NDArray[np.uint8]  # alphas x pairs x H x W x C


def mixup_samples_info(densities: MixupDensities, images: NDArray[np.uint8]) -> MixupSamples:
    """Mix a few random pairs with coefficients drawn for the lowest, middle and highest alpha in use.

    Args:
        densities: has the alphas.
        images: training images, N x C x H x W with C of 1 or 3, before augmentation.
    """
    study = densities.study
    used = np.sort(densities.alphas["alpha"].unique())
    alphas = list(dict.fromkeys(float(used[place]) for place in (0, len(used) // 2, len(used) - 1)))
    draw = stream(study.seed, "mixup", "figure")
    chosen = draw.choice(len(images), size=(2, PAIRS), replace=len(images) < 2 * PAIRS)
    first, second = images[chosen].transpose(0, 1, 3, 4, 2)
    coefficients = np.stack([draw.beta(alpha, alpha, size=PAIRS) for alpha in alphas])
    weights = coefficients[..., None, None, None]
    mixed = np.round(weights * first + (1 - weights) * second).astype(np.uint8)
    return MixupSamples(study, first, second, alphas, coefficients, mixed)


@in_style
def draw_mixup_samples(info: MixupSamples) -> Figure:
    """A column per pair: both images, then the mixtures, with the coefficient below each."""
    names = ["xᵢ", "xⱼ", *(f"α = {alpha:.2g}" for alpha in info.alphas)]
    figure, axes = panels(
        info.study.name, "images as Mixup makes them",
        f"λ xᵢ + (1 − λ) xⱼ of n = {PAIRS} random pairs, λ from Beta(α, α), for α in use in the cells.",
        [""] * len(names), [""] * PAIRS, width=0.85, height=0.72,
    )  # fmt: skip
    for row, images in enumerate([info.first, info.second, *info.mixed]):
        for column, image in enumerate(images):
            panel = axes[row, column]
            panel.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            if row >= 2:
                panel.set_xlabel(f"λ = {info.coefficients[row - 2, column]:.2f}", fontsize=7, labelpad=2)
        axes[row, 0].set_ylabel(names[row], rotation=0, ha="right", va="center")
    return figure
