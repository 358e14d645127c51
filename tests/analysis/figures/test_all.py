"""Figures from constructed frames and records: what they show, that they show it whatever is missing, and that they
are the same each time."""

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from opda.nonparametric import EmpiricalDistribution
from typer.testing import CliRunner

from lbstudy.analysis import load
from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.figures import mixup as figures_mixup
from lbstudy.analysis.figures import runs as figures_runs
from lbstudy.analysis.figures import style
from lbstudy.analysis.figures import tuning as figures_tuning
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.spec import StudySpec
from tests.conftest import tiny_study
from tests.records.test_folder import record

ODD_NAME = "a$b_$ <i>&100%^{-->"


def make_study(
    optimizers: tuple[str, ...] = ("sgd", "kfac"), batch_sizes: tuple[int, ...] = (32, 128, 512),
    smoothings: tuple[str, ...] = ("none", "mixup"), sampler: str = "tpe", **changes: object,
) -> StudySpec:  # fmt: skip
    cells = {"optimizer": optimizers, "batch_size": batch_sizes, "smoothing": smoothings}
    search: dict[str, object] = {"learning_rate": {"log_uniform": [1e-3, 10]}}
    if "mixup" in smoothings:
        search["mixup_alpha"] = {"uniform": [0.1, 1], "when": {"smoothing": "mixup"}}
    tuning = {"trials": 4, "sampler": sampler}
    return tiny_study(**{"cells": cells, "search": search, "published": [], "tuning": tuning} | changes)


def make_trials(
    study: StudySpec, statuses: tuple[str, ...] = ("completed", "completed", "pruned", "diverged")
) -> pd.DataFrame:
    """A trial of each status in each cell; rate 0.1 * 2^number, accuracy 0.5 + 0.1 * number."""
    rows = []
    for cell in study.list_cells():
        for number, status in enumerate(statuses):
            row = {
                "cell": cell.name, "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
                "number": number, "status": status, "published": False, "epochs": 4, "step": 40, "seconds": 1.0,
                "val_accuracy": 0.5 + 0.1 * number, "val_loss": 1 - 0.1 * number, "train_loss": 0.4,
                "params.learning_rate": 0.1 * 2**number,
                "params.mixup_alpha": 0.2 + 0.1 * number if cell.smoothing == "mixup" else np.nan,
            }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def make_epochs(study: StudySpec, confirmed: bool, seeds: int = 3, epochs: int = 4) -> pd.DataFrame:
    """Accuracy 0.1 * epoch + 0.01 * seed; of tuning, epochs of each cell's trial 1, its best."""
    rows = []
    for cell in study.list_cells():
        for seed, epoch in product(range(seeds), range(1, epochs + 1)):
            row = {
                "cell": cell.name, "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
                "epoch": epoch, "step": 10 * epoch, "train_loss": 2.0 / epoch, "val_loss": 2.0 / epoch,
                "val_accuracy": 0.1 * epoch + 0.01 * seed,
            } | ({
                "number": seed, "trial": 1, "repeat": seed, "rank": 0, "published": False,
                "clean_train_loss": 1.0 / epoch, "test_accuracy": 0.05 * epoch + 0.01 * seed, "test_loss": 1.0,
            } if confirmed else {"number": 1})  # fmt: skip
            rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.astype({"rank": "Int64"}) if confirmed else frame


def make_reached(study: StudySpec, steps: Callable[[int], list[float]]) -> pd.DataFrame:
    """Runs of each cell with the steps that a batch size takes."""
    rows = [
        (cell.optimizer, cell.batch_size, cell.smoothing, repeat, s, s / 10, s / 100, 0.9 * s if s < np.inf else 20.0)
        for cell in study.list_cells()
        for repeat, s in enumerate(steps(cell.batch_size))
    ]
    names = ["optimizer", "batch_size", "smoothing", "repeat", "steps", "epochs", "seconds", "steps_low"]
    return pd.DataFrame(rows, columns=names)


def images(count: int = 20, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(count, channels, 8, 8), dtype=np.uint8)


def draw_everything(study: StudySpec, trials: pd.DataFrame, confirmed: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that these data allow."""
    targets = figures_runs.steps_to_target_info
    epochs = make_epochs(study, confirmed=False, seeds=1)

    @cache
    def curves() -> figures_runs.LearningCurves:
        return figures_runs.learning_curves_info(study, trials, epochs, confirmed)

    reached = make_reached(study, lambda batch: [3200.0 / batch, 6400.0 / batch if batch < 512 else np.inf])
    all_of_them: dict[str, Callable[[], Figure]] = {
        "curves": lambda: figures_runs.draw_learning_curves(curves()),
        "steps": lambda: figures_runs.draw_learning_curves(curves(), "step"),
        "target": lambda: figures_runs.draw_steps_to_target(targets(study, reached, "accuracy $0.9_$")),
        "rates": lambda: figures_tuning.draw_best_rates(figures_tuning.best_rates_info(study, trials)),
        "tuning": lambda: figures_tuning.draw_tuning_curves(figures_tuning.tuning_curves_info(study, trials)),
        "rate": lambda: figures_tuning.draw_sensitivity(figures_tuning.sensitivity_info(study, trials, "learning_rate")),
        "alpha": lambda: figures_tuning.draw_sensitivity(figures_tuning.sensitivity_info(study, trials, "mixup_alpha")),
        "beta": lambda: figures_mixup.draw_mixup_densities(figures_mixup.mixup_densities_info(study, trials)),
        "mixed": lambda: figures_mixup.draw_mixup_samples(
            figures_mixup.mixup_samples_info(figures_mixup.mixup_densities_info(study, trials), images())
        ),
    }  # fmt: skip
    drawn, reasons = {}, []
    for name, draw in all_of_them.items():
        try:
            drawn[name] = draw()
        except NothingToDraw as nothing:
            reasons.append(str(nothing))
    assert all(reasons)
    return drawn


def of_cell(frame: pd.DataFrame, cell: str) -> pd.DataFrame:
    return frame[frame["cell"] == cell]


FULL = {"curves", "steps", "target", "rates", "tuning", "rate", "alpha", "beta", "mixed"}
NOT_CONFIRMED = pd.DataFrame()


def full() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study()
    return study, make_trials(study), make_epochs(study, confirmed=True)


def whole() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(batch_sizes=(32, 512))
    return study, make_trials(study), make_epochs(study, confirmed=True)


def not_confirmed() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(batch_sizes=(32, 512))
    return study, make_trials(study), NOT_CONFIRMED


def one_seed() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(batch_sizes=(32, 512))
    return study, make_trials(study), make_epochs(study, confirmed=True, seeds=1)


def one_cell() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(("sgd",), (32,), ("none",))
    return study, make_trials(study), NOT_CONFIRMED


def no_kfac() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(("sgd",), (32, 512))
    return study, make_trials(study), NOT_CONFIRMED


def cell_diverged() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(batch_sizes=(32, 512))
    trials = make_trials(study)
    trials.loc[trials["cell"] == "kfac-b32-mixup", "status"] = "diverged"
    confirmed = make_epochs(study, confirmed=True)
    return study, trials, confirmed[confirmed["cell"] != "kfac-b32-mixup"]


def all_diverged() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(batch_sizes=(32, 512))
    return study, make_trials(study, ("diverged", "failed")).assign(val_accuracy=np.nan), NOT_CONFIRMED


def many_batch_sizes() -> tuple[StudySpec, pd.DataFrame, pd.DataFrame]:
    study = make_study(
        ("sgd", "lars", "adamw", "kfac"),
        tuple(2**k for k in range(1, 10)),
        ("none",),
        search={"learning_rate": {"uniform": [0.05, 1]}},
    )
    return study, make_trials(study), NOT_CONFIRMED


@pytest.mark.parametrize(("case", "expected"), [
    (whole, FULL), (not_confirmed, FULL), (one_seed, FULL), pytest.param(no_kfac, FULL, marks=pytest.mark.slow), (cell_diverged, FULL),
    (one_cell, {"curves", "steps", "target", "tuning", "rate"}),
    (all_diverged, {"target", "tuning", "rate", "alpha"}),
    pytest.param(
        many_batch_sizes, {"curves", "steps", "target", "rates", "tuning", "rate"}, marks=pytest.mark.slow
    ),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_figures_of_whole_and_partial_studies(case: Callable, expected: set[str]):
    before = mpl.rcParams.copy()
    study, trials, confirmed = case()
    drawn = draw_everything(study, trials, confirmed)
    assert set(drawn) == expected
    for figure in drawn.values():
        heading = figure.get_suptitle()
        assert heading.startswith("tiny: ")
        assert re.search(r"\bn = \d", heading)
        assert figure.canvas.manager is None  # not pyplot's
        grid = [axes for axes in figure.axes if axes.get_subplotspec()]
        assert all(axes.get_ylabel() for axes in grid if axes.get_subplotspec().is_first_col())
        assert all(axes.get_xlabel() for axes in grid if axes.get_subplotspec().is_last_row())
        style.in_style(figure.draw_without_rendering)()  # lays it out; a layout that does not fit is a warning
    assert {**mpl.rcParams, "backend": None} == {**before, "backend": None}


def test_colour_is_optimizer_line_is_batch_size_marker_is_smoothing():
    study, trials, confirmed = full()
    info = figures_runs.learning_curves_info(study, trials, make_epochs(study, confirmed=False), confirmed)
    figure = figures_runs.draw_learning_curves(info)
    encoding = style.Encoding.of(study)
    cells = [
        [
            encoding.look(optimizer, batch_size, smoothing)
            for optimizer in ("sgd", "kfac")
            for batch_size in (32, 128, 512)
        ]
        for smoothing in ("none", "mixup")
    ]
    assert len({str(look) for column in cells for look in column}) == 12
    for axes, expected in zip(figure.axes, cells * 3, strict=True):
        shown = [(line.get_color(), line.get_marker()) for line in axes.get_lines()]
        assert shown == [(look["color"], look["marker"]) for look in expected]
        assert len({str(line._dash_pattern) for line in axes.get_lines()}) == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["SGD", "K-FAC", "batch 32", "batch 128", "batch 512", "no smoothing", "Mixup"]


def test_learning_curves_are_means_over_seeds_of_the_best_configuration():
    study, trials, confirmed = full()
    others = confirmed.assign(rank=1, repeat=confirmed["repeat"] + 10, val_accuracy=0.99).astype({"rank": "Int64"})
    published = others.assign(rank=pd.NA).astype({"rank": "Int64"})
    runs = pd.concat([confirmed, others, published])
    info = figures_runs.learning_curves_info(study, trials, make_epochs(study, confirmed=False), runs)
    curve = of_cell(info.points, "sgd-b32-none").query("metric == 'val_accuracy'")
    assert curve["epoch"].tolist() == [1, 2, 3, 4]
    assert curve["step"].tolist() == [10, 20, 30, 40]
    assert curve["n"].tolist() == [3] * 4
    np.testing.assert_allclose(curve["mean"], [0.11, 0.21, 0.31, 0.41])
    np.testing.assert_allclose(curve["low"], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(curve["high"], [0.12, 0.22, 0.32, 0.42])
    assert set(info.points["metric"]) == {"val_accuracy", "test_accuracy", "clean_train_loss"}
    assert (info.diverged, info.missing) == ({}, [])


def test_validation_accuracy_of_runs_that_trained_on_all_samples_is_left_out():
    study, trials, confirmed = full()
    info = figures_runs.learning_curves_info(study, trials, NOT_CONFIRMED, confirmed, "all")
    assert set(info.points["metric"]) == {"test_accuracy", "clean_train_loss"}
    assert "Confirmed runs on all training samples" in figures_runs.draw_learning_curves(info).get_suptitle()


def test_diverged_seed_keeps_its_accuracy_and_ends_the_loss():
    study, trials, confirmed = full()
    dead = (confirmed["cell"] == "sgd-b32-none") & (confirmed["repeat"] == 2)
    confirmed.loc[dead & (confirmed["epoch"] == 2), ["clean_train_loss", "train_loss", "val_loss"]] = np.nan
    confirmed.loc[dead & (confirmed["epoch"] == 2), "val_accuracy"] = 0.0
    confirmed = confirmed[~(dead & (confirmed["epoch"] > 2))]
    info = figures_runs.learning_curves_info(study, trials, NOT_CONFIRMED, confirmed)
    assert info.diverged == {"sgd-b32-none": (1, 3)}
    cell = of_cell(info.points, "sgd-b32-none")
    accuracy, loss = cell[cell["metric"] == "val_accuracy"], cell[cell["metric"] == "clean_train_loss"]
    np.testing.assert_allclose(
        accuracy["mean"], [0.11, (0.2 + 0.21 + 0) / 3, (0.3 + 0.31 + 0) / 3, (0.4 + 0.41 + 0) / 3]
    )
    assert loss["epoch"].tolist() == [1]
    heading = figures_runs.draw_learning_curves(info).get_suptitle().replace("\n", " ")
    assert "sgd-b32-none 1 of 3" in heading


def test_the_loss_of_a_run_about_to_diverge_does_not_flatten_the_others():
    study, trials, confirmed = full()
    assert (
        "cut off"
        not in figures_runs.draw_learning_curves(
            figures_runs.learning_curves_info(study, trials, NOT_CONFIRMED, confirmed)
        ).get_suptitle()
    )
    confirmed.loc[(confirmed["cell"] == "sgd-b32-none") & (confirmed["epoch"] == 3), "clean_train_loss"] = 5000.0
    info = figures_runs.learning_curves_info(study, trials, NOT_CONFIRMED, confirmed)
    figure = figures_runs.draw_learning_curves(info)
    (panel,) = [axes for axes in figure.axes if axes.get_ylabel() == "training loss, clean"]
    assert panel.get_ylim() == pytest.approx((0.9 / 4, 2))
    assert "Losses above 2 are cut off" in figure.get_suptitle().replace("\n", " ")


def test_run_that_failed_half_way_does_not_count():
    study, trials, confirmed = full()
    failed = (confirmed["cell"] == "sgd-b32-none") & (confirmed["repeat"] == 0)
    info = figures_runs.learning_curves_info(
        study, trials, NOT_CONFIRMED, confirmed[~(failed & (confirmed["epoch"] > 1))]
    )
    curve = of_cell(info.points, "sgd-b32-none").query("metric == 'val_accuracy'")
    assert curve["n"].tolist() == [2] * 4
    np.testing.assert_allclose(curve["mean"], [0.115, 0.215, 0.315, 0.415])


def test_cells_without_confirmed_runs_show_their_best_trial():
    study, trials, confirmed = full()
    epochs = make_epochs(study, confirmed=False, seeds=1)
    epochs = pd.concat([epochs, epochs.assign(number=0, val_accuracy=0.0)])  # trial 1 is the best one, 0 is not
    info = figures_runs.learning_curves_info(study, trials, epochs, confirmed[confirmed["cell"] != "sgd-b32-none"])
    curve = of_cell(info.points, "sgd-b32-none")
    assert set(curve["metric"]) == {"val_accuracy"}  # its training loss is another one
    assert not curve["confirmed"].any()
    np.testing.assert_allclose(curve["mean"], [0.1, 0.2, 0.3, 0.4])
    assert curve["low"].isna().all()
    assert "Pale" in figures_runs.draw_learning_curves(info).get_suptitle()
    unconfirmed = figures_runs.learning_curves_info(study, trials, epochs, NOT_CONFIRMED)
    assert set(unconfirmed.points["metric"]) == {"val_accuracy", "train_loss"}
    assert "No run was confirmed" in figures_runs.draw_learning_curves(unconfirmed).get_suptitle()


def test_sensitivity_marks_best_and_diverged():
    study = make_study()
    trials = pd.concat(
        [make_trials(study), make_trials(study, ("failed", "running")).assign(number=9)], ignore_index=True
    )
    info = figures_tuning.sensitivity_info(study, trials, "learning_rate")
    cell = of_cell(info.trials, "sgd-b32-none")
    assert cell["status"].tolist() == ["completed", "completed", "pruned", "diverged"]
    assert cell["best"].tolist() == [False, True, False, False]
    np.testing.assert_allclose(cell["value"], [0.1, 0.2, 0.4, 0.8])
    np.testing.assert_allclose(cell["val_accuracy"], [0.5, 0.6, 0.7, np.nan])
    assert info.log
    assert info.bounds == (1e-3, 10)
    alpha = figures_tuning.sensitivity_info(study, trials, "mixup_alpha")
    assert set(alpha.trials["smoothing"]) == {"mixup"}
    assert not alpha.log


def test_diverged_trials_are_drawn_at_the_bottom():
    study = make_study(("sgd",), (32,), ("none",))
    figure = figures_tuning.draw_sensitivity(
        figures_tuning.sensitivity_info(study, make_trials(study), "learning_rate")
    )
    (axes,) = figure.axes
    (crosses,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    np.testing.assert_allclose(crosses.get_xdata(), [0.8])
    heights = axes.transAxes.inverted().transform(crosses.get_transform().transform(crosses.get_xydata()))[:, 1]
    others = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    lowest = min(
        axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))[:, 1].min()
        for line in others
    )
    assert 0 < heights[0] < lowest
    assert axes.get_xscale() == "log"


def test_best_rates_and_scaling_rules():
    study, trials, _ = full()
    trials.loc[(trials["cell"] == "kfac-b32-none") & (trials["status"] == "completed"), "status"] = "pruned"
    cells = (
        figures_tuning.best_rates_info(study, trials)
        .cells.set_index(["optimizer", "smoothing", "batch_size"])
        .sort_index()
    )
    sgd = cells.loc[("sgd", "none")]
    np.testing.assert_allclose(sgd["best"], 0.2)
    np.testing.assert_allclose(sgd["linear"], [0.2, 0.8, 3.2])
    np.testing.assert_allclose(sgd["sqrt"], [0.2, 0.4, 0.8])
    assert (sgd["low"].iloc[0], sgd["high"].iloc[0]) == (1e-3, 10)
    kfac = cells.loc[("kfac", "none")]
    assert kfac["linear"].isna().all()  # the smallest batch has no best rate to scale
    np.testing.assert_allclose(kfac["best"], [np.nan, 0.2, 0.2])


def test_expected_best_is_the_mean_over_all_draws():
    study = make_study(("sgd",), (32,), ("none",), sampler="random")
    trials = make_trials(study, ("completed", "completed", "diverged"))
    trials = pd.concat([trials, trials[:1].assign(number=3, published=True, val_accuracy=1.0)], ignore_index=True)
    info = figures_tuning.tuning_curves_info(study, trials)
    scores = [0.5, 0.6, 0.0]  # diverged: nothing found; published: no draw of the sampler
    expected = [np.mean([max(draw) for draw in product(scores, repeat=k)]) for k in (1, 2, 3)]
    np.testing.assert_allclose(info.points["expected"], expected)
    assert info.guaranteed
    assert (info.points["low"] <= info.points["expected"]).all()
    assert (info.points["high"] >= info.points["expected"]).all()


@pytest.mark.parametrize("simulated", [figures_tuning.SIMULATED, 0])
@pytest.mark.parametrize("decimals", [12, 1])  # practically continuous; and with many ties
def test_bands_of_tuning_curves_cover_the_true_curve(decimals: int, simulated: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures_tuning, "SIMULATED", simulated)
    rng, trials = np.random.default_rng(0), 8
    ks = np.arange(1, trials + 1)
    values = np.round(np.linspace(0, 1, 20001), decimals)  # the population that is drawn from
    levels, counts = np.unique(values, return_counts=True)
    cdf = np.cumsum(counts) / counts.sum()
    truth = np.array([(levels * np.diff(cdf**k, prepend=0)).sum() for k in ks])
    covered = 0
    for _ in range(400):
        low, high = figures_tuning._bands(rng.choice(values, size=trials), 1.0, ks, least=False)
        covered += bool(((low <= truth) & (truth <= high)).all())
    assert covered / 400 >= figures_tuning.CONFIDENCE - 0.06  # three standard errors


@pytest.mark.parametrize(("sampler", "statuses", "words"), [
    ("random", ("completed", "pruned"), "Random trials, some of them pruned"),
    ("tpe", ("completed", "completed"), "TPE trials: not independent"),
    ("tpe", ("completed", "pruned"), "TPE trials, some of them pruned"),
    ("qmc", ("completed", "completed"), "Quasi-random trials: not independent"),
])  # fmt: skip
def test_no_bands_where_they_would_promise_too_much(
    sampler: str, statuses: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
):
    def simulate(*_: object, **__: object) -> None:
        raise AssertionError("bands are computed, and thrown away")

    monkeypatch.setattr(EmpiricalDistribution, "confidence_bands", simulate)
    study = make_study(sampler=sampler)
    info = figures_tuning.tuning_curves_info(study, make_trials(study, statuses))
    assert not info.guaranteed
    assert info.points[["low", "high"]].isna().all(axis=None)
    heading = figures_tuning.draw_tuning_curves(info).get_suptitle().replace("\n", " ")
    assert words in heading
    assert "no guarantee" in heading


def test_curves_of_thousands_of_trials_are_thinned():
    study = make_study(("sgd",), (32,), ("none",), sampler="random")
    accuracies = np.random.default_rng(0).random(2000)
    (row,) = (make_trials(study, ("completed",)),)
    trials = pd.concat([row] * 2000, ignore_index=True).assign(number=range(2000), val_accuracy=accuracies)
    points = figures_tuning.tuning_curves_info(study, trials).points.set_index("k")
    assert len(points) < 300
    assert {1, 2, 3, 2000} <= set(points.index)
    ordered, ranks = np.sort(accuracies), np.arange(1, 2001)
    for k in (1, 2, 2000):
        share = (ranks / 2000) ** k - ((ranks - 1) / 2000) ** k  # of draws of k whose best one has that rank
        np.testing.assert_allclose(points.loc[k, "expected"], ordered @ share)
    assert (points["low"] < points["expected"]).all()
    assert (points["expected"] < points["high"]).all()


def tuned_for_steps() -> tuple[StudySpec, pd.DataFrame]:
    """In each cell hits after 10 and 20 steps, a miss, a pruned trial and one that diverged."""
    tuning = {"trials": 5, "sampler": "random", "metric": "steps_to_target", "target": {"val_accuracy": 0.7}}
    study = make_study(tuning=tuning)
    trials = make_trials(study, ("completed", "completed", "completed", "pruned", "diverged"))
    times = {0: 20.0, 1: 10.0, 2: np.inf}
    return study, trials.assign(steps_to_target=trials["number"].map(times), nearest=0.6)


def test_sensitivity_of_a_study_for_a_target_is_one_of_times():
    study, trials = tuned_for_steps()
    info = figures_tuning.sensitivity_info(study, trials, "learning_rate")
    cell = of_cell(info.trials, "kfac-b128-none")
    assert cell["status"].tolist() == ["completed", "completed", "missed", "pruned", "diverged"]
    np.testing.assert_allclose(cell["steps_to_target"], [20, 10, np.nan, np.nan, np.nan])
    assert cell["best"].tolist() == [False, True, False, False, False]
    figure = figures_tuning.draw_sensitivity(info)
    axes = figure.axes[0]
    heights = {
        line.get_marker(): axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))[:, 1]
        for line in axes.get_lines()
        if line.get_marker() == "x" and len(line.get_xdata())
    }
    assert heights["x"] > 0.9
    assert "steps to validation accuracy 0.7" in figure.get_suptitle()


def test_expected_least_time_is_the_mean_over_all_draws():
    study, trials = tuned_for_steps()
    info = figures_tuning.tuning_curves_info(study, trials)
    scores = [20, 10, 40, 40, 40]  # not reached: four epochs of ten steps
    expected = [np.mean([min(draw) for draw in product(scores, repeat=k)]) for k in (1, 2, 3, 4, 5)]
    cell = of_cell(info.points, "sgd-b32-none")
    np.testing.assert_allclose(cell["expected"], expected)
    assert not info.guaranteed
    unpruned = figures_tuning.tuning_curves_info(study, trials[trials["status"] != "pruned"])
    assert unpruned.guaranteed
    points = of_cell(unpruned.points, "sgd-b32-none")
    assert (points["low"] <= points["expected"]).all()
    assert (points["expected"] <= points["high"]).all()
    never = trials.assign(steps_to_target=np.inf).where(trials["cell"] == "sgd-b32-none", trials)
    assert of_cell(figures_tuning.tuning_curves_info(study, never).points, "sgd-b32-none")["expected"].isna().all()
    seconds = study.model_copy(update={"tuning": study.tuning.model_copy(update={"metric": "seconds_to_target"})})
    in_seconds = trials.assign(seconds_to_target=trials["steps_to_target"] / 80)
    found = of_cell(figures_tuning.tuning_curves_info(seconds, in_seconds).points, "sgd-b32-none")
    first = np.mean([20 / 80, 10 / 80, 1, 1, 1])  # 40 steps of 1/40 s
    np.testing.assert_allclose(found["expected"].iloc[0], first)
    figure = figures_tuning.draw_tuning_curves(info)
    assert "expected fewest steps to validation accuracy 0.7" in figure.get_suptitle()


def test_learning_curves_have_the_evaluations_within_epochs():
    study, _, confirmed = full()
    inner = [
        [
            {
                "step": 10 * epoch - 5,
                "epochs": epoch - 0.5,
                "seconds": 0.5,
                "val_accuracy": 0.1 * epoch - 0.03,
                "val_loss": 1.0,
            }
        ]
        for epoch in confirmed["epoch"]
    ]
    watched = confirmed.assign(within=inner, seconds=1.0)
    watched = watched[list(dict.fromkeys([*load.CONFIRMED_KEY, *watched]))]  # in the order that they are loaded in
    info = figures_runs.learning_curves_info(study, make_trials(study), make_epochs(study, False), watched)
    plain = figures_runs.learning_curves_info(study, make_trials(study), make_epochs(study, False), confirmed)
    assert info.diverged == plain.diverged == {}
    curve = of_cell(info.points, "sgd-b32-none").set_index(["metric", "step"])["mean"]
    np.testing.assert_allclose(curve["val_accuracy"].loc[[5, 15, 35]], [0.07, 0.17, 0.37])
    before = of_cell(plain.points, "sgd-b32-none").set_index(["metric", "step"])["mean"]
    np.testing.assert_allclose(curve["val_accuracy"].loc[[10, 20, 40]], before["val_accuracy"].loc[[10, 20, 40]])
    pd.testing.assert_series_equal(curve["test_accuracy"], before["test_accuracy"])  # at the ends of epochs only


def test_steps_to_target_and_ideal_scaling():
    study = make_study(("sgd",), smoothings=("none",))
    steps = {32: [np.inf, 100.0, 80.0], 128: [50.0, 30.0, 40.0], 512: [np.inf, 20.0, np.inf]}
    info = figures_runs.steps_to_target_info(study, make_reached(study, lambda batch: steps[batch]), "accuracy 0.9")
    assert info.cells["batch_size"].tolist() == [32, 128, 512]
    assert info.cells["median"].tolist() == [100, 40, np.inf]
    assert info.cells["missed"].tolist() == [1, 0, 2]
    assert info.cells["n"].tolist() == [3, 3, 3]
    np.testing.assert_allclose(info.cells["ideal"], [100, 25, 6.25])
    (axes,) = figures_runs.draw_steps_to_target(info).axes
    (missed,) = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    assert missed.get_xdata() == [512]
    assert missed.get_ydata() == [figures_runs.MISSED_AT]
    assert axes.get_ylim()[1] > 100


def test_ideal_scaling_begins_at_the_smallest_batch_that_reaches_the_target():
    study = make_study(("sgd",), smoothings=("none",))
    reached = make_reached(study, lambda batch: [np.inf if batch == 32 else 40.0])
    ideal = figures_runs.steps_to_target_info(study, reached, "x").cells["ideal"]
    np.testing.assert_allclose(ideal, [np.nan, 40, 10])
    epochs = figures_runs.steps_to_target_info(study, reached, "x", "epochs").cells["ideal"]
    np.testing.assert_allclose(epochs, [np.nan, 4, 4])
    with pytest.raises(NothingToDraw, match="no run has reached accuracy 0.9"):
        figures_runs.steps_to_target_info(study, reached.assign(steps=np.inf), "accuracy 0.9")


def test_mixup_densities():
    study, trials, _ = full()
    trials.loc[trials["cell"] == "sgd-b32-mixup", "params.mixup_alpha"] = 1.0
    trials.loc[trials["cell"] == "sgd-b128-mixup", "params.mixup_alpha"] = 2.0
    info = figures_mixup.mixup_densities_info(study, trials)
    x = info.densities.index.to_numpy()
    np.testing.assert_allclose(info.densities["sgd-b32-mixup"], 1)
    np.testing.assert_allclose(info.densities["sgd-b128-mixup"], 6 * x * (1 - x))
    assert info.alphas.set_index("cell")["alpha"]["kfac-b32-mixup"] == pytest.approx(0.3)  # of its best trial
    fixed = make_study(search={"learning_rate": {"log_uniform": [1e-3, 10]}}, fixed={"mixup_alpha": 0.7})
    assert set(
        figures_mixup.mixup_densities_info(fixed, trials.drop(columns="params.mixup_alpha")).alphas["alpha"]
    ) == {0.7}


@pytest.mark.parametrize("channels", [1, 3])
def test_mixup_samples(channels: int):
    study, trials, _ = full()
    trials["params.mixup_alpha"] = trials["batch_size"].map({32: 0.3, 128: 0.4, 512: 0.8})
    densities = figures_mixup.mixup_densities_info(study, trials)
    info = figures_mixup.mixup_samples_info(densities, images(channels=channels))
    assert info.alphas == [0.3, 0.4, 0.8]
    assert info.mixed.shape == (3, 6, 8, 8, channels)
    share = info.coefficients[1, 2]
    np.testing.assert_allclose(info.mixed[1, 2], share * info.first[2] + (1 - share) * info.second[2], atol=0.51)
    again = figures_mixup.mixup_samples_info(densities, images(channels=channels))
    np.testing.assert_array_equal(again.mixed, info.mixed)
    assert len(figures_mixup.draw_mixup_samples(info).axes) == 5 * 6


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_same_figure_same_bytes_whatever_the_study_is_called(suffix: str, tmp_path: Path):
    study, trials, _ = full()
    study = study.model_copy(update={"name": ODD_NAME})
    contents = set()
    for turn in range(2):
        figure = figures_tuning.draw_best_rates(figures_tuning.best_rates_info(study, trials))
        assert figure.get_suptitle().startswith(ODD_NAME)
        style.write(figure, tmp_path / f"{turn}.{suffix}")
        contents.add((tmp_path / f"{turn}.{suffix}").read_bytes())
    assert len(contents) == 1


def test_embedded_svg_is_sound_takes_the_colour_of_the_page_and_leaks_nothing():
    study, trials, _ = full()
    study = study.model_copy(update={"name": ODD_NAME})
    figure = figures_tuning.draw_tuning_curves(figures_tuning.tuning_curves_info(study, trials))
    svg = style.embeddable_svg(figure, "tuning", f'"{ODD_NAME}"')
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == f'"{ODD_NAME}"'
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("tuning-") for name in ids)
    links = re.findall(r'(?:href="|url\()#([^")]+)', svg)
    assert links
    assert set(links) <= set(ids)
    assert "currentColor" in svg
    assert style.INK not in svg
    assert style.COLOURS[1].lower() in svg
    for foreign in ("<style", "<script", "<!--", "<?xml", "<i>", "<metadata"):
        assert foreign not in svg


def test_command_writes_what_can_be_drawn_and_says_what_cannot(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    for number, accuracy in enumerate((0.5, 0.6)):
        metrics = {"epoch": 1, "step": 10, "val_accuracy": accuracy, "val_loss": 0.5, "train_loss": 0.4}
        trial = record(number=number, status="completed", params={"learning_rate": 0.1 * (number + 1)}, metrics=metrics)
        folder.write_trial(trial)
        folder.append_epoch(trial, metrics)
    result = CliRunner().invoke(app, ["figures", str(folder.path), "--format", "svg"])
    assert result.exit_code == 0, result.output
    written = {path.stem for path in (folder.path / "figures").iterdir()}
    assert written == {
        "accuracy", "learning_curves", "learning_curves_steps", "best_learning_rates", "tuning_curves",
        "sensitivity_learning_rate",
    }  # fmt: skip
    lines = result.output.splitlines()
    assert "left out mixup_densities: no trial with Mixup has completed" in lines
    assert len(lines) == len(written) + len([line for line in lines if line.startswith("left out ")])


def test_study_without_trials_leaves_out_all_figures(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "e", tiny_study())
    drawings = list(figures.draw_all(folder))
    assert drawings
    assert all(drawing.figure is None and drawing.reason for drawing in drawings)


def test_images_that_cannot_be_read_are_a_reason(tmp_path: Path):
    study = tiny_study(dataset={"name": "image_folder", "root": str(tmp_path / "nowhere")})
    with pytest.raises(NothingToDraw, match="the images cannot be read here: .*nowhere"):
        figures._images(study)


def test_folder_that_cannot_be_written_is_bad_input(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "e", tiny_study())
    (folder.path / "figures").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        list(figures.write_all(folder, "svg"))
