"""Accuracy against batch size, and the gap: what is drawn, against SciPy, and what a reader finds by pointing at it."""

import re
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy import stats as scipy_stats

from lbstudy.analysis import load
from lbstudy.analysis.figures import accuracy as figures_accuracy
from lbstudy.analysis.figures import gaps as figures_gaps
from lbstudy.analysis.figures import style
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.tables.gaps import gap_table
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import confirmed_study, study_of

STUDY = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"])
RUNS = {
    "sgd-b32-none": [0.9, 0.91, 0.92], "sgd-b128-none": [0.8, 0.81, 0.83], "sgd-b128-mixup": [0.86, 0.86, 0.89],
    "sgd-b32-mixup": [0.9, 0.9, 0.92], "kfac-b32-none": [0.95], "kfac-b128-none": [0.97, 0.2, nan],
}  # fmt: skip


def info_of(folder: StudyFolder) -> figures_accuracy.Accuracy:
    return figures_accuracy.accuracy_info(folder.study(), load.trials(folder), load.confirmed(folder))


def test_means_and_intervals_are_those_of_the_confirmed_runs(tmp_path: Path):
    found = info_of(confirmed_study(tmp_path, STUDY, RUNS))
    cells = found.cells.set_index(["optimizer", "batch_size", "smoothing"])
    assert found.confirmed
    assert found.lost == {"kfac-b128-none": (1, 3)}
    assert len(cells) == 6  # K-FAC with Mixup has no confirmed run
    runs = RUNS["sgd-b128-none"]
    margin = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(runs) / (np.mean(runs) * (1 - np.mean(runs)))
    ends = special.expit(special.logit(np.mean(runs)) + np.array([-margin, margin]))
    row = cells.loc["sgd", 128, "none"]
    assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx((np.mean(runs), *ends, 3))
    assert isnan(cells.loc["kfac", 32, "none"]["low"])
    wide = cells.loc["kfac", 128, "none"]  # a t interval would be [-4.3, 5.5]
    assert 0 < wide["low"] < wide["value"] < wide["high"] < 1
    assert (
        sorted(found.runs.query("optimizer == 'sgd' and batch_size == 128 and smoothing == 'none'")["accuracy"]) == runs
    )


def test_without_confirmed_runs_it_is_the_best_trials(tmp_path: Path):
    found = info_of(confirmed_study(tmp_path, STUDY, {}))
    assert not found.confirmed
    assert set(found.cells["value"]) == {0.9}
    figure = figures_accuracy.draw_accuracy(found)
    assert "Nothing was confirmed" in figure.get_suptitle()
    assert figure.axes[0].get_ylabel() == "validation accuracy, %"
    with pytest.raises(NothingToDraw, match="no trial has completed"):
        info_of(StudyFolder.create(tmp_path / "empty", STUDY))


def test_a_reader_who_points_at_a_mean_sees_it(tmp_path: Path):
    figure = figures_accuracy.draw_accuracy(info_of(confirmed_study(tmp_path / "s", STUDY, RUNS)))
    svg = style.embeddable_svg(figure, "accuracy", "x")
    assert "<title>K-FAC, batch 32, no smoothing: 95.00 %, n = 1</title>" in svg
    assert "tip: " not in svg
    assert "Diverged, and in no mean: 1 of 3 runs of kfac-b128-none." in figure.get_suptitle().replace("\n", " ")
    style.write(figure, tmp_path / "figure.svg")
    assert "<title>K-FAC, batch 32, no smoothing: 95.00 %, n = 1</title>" in (tmp_path / "figure.svg").read_text()


def test_an_embedded_figure_has_the_coordinates_of_the_file_to_a_hundredth_of_a_point(tmp_path: Path):
    info = info_of(confirmed_study(tmp_path / "s", STUDY, RUNS))
    style.write(figures_accuracy.draw_accuracy(info), tmp_path / "figure.svg")
    embedded = style.embeddable_svg(figures_accuracy.draw_accuracy(info), "accuracy", "x")
    numbers = [
        re.findall(r"-?\d+\.?\d*", " ".join(re.findall(r' d="([^"]*)"', svg)))
        for svg in ((tmp_path / "figure.svg").read_text(), embedded)
    ]
    exact, rounded = (np.unique(np.array(found, float)) for found in numbers)
    assert np.abs(rounded[:, None] - exact).min(axis=1).max() <= 0.0051
    assert max(len(number.partition(".")[2]) for number in numbers[0]) > 2
    assert max(len(number.partition(".")[2]) for number in numbers[1]) == 2


def factors_study(**cells: object) -> StudySpec:
    content = STUDY.model_dump(by_alias=True, exclude_none=True)
    return StudySpec.model_validate({**content, "cells": {**content["cells"], "model": ["lenet5", "vgg9"], **cells}})


def test_combinations_of_factors_have_rows(tmp_path: Path):
    study = factors_study()
    runs = {f"{cell}-{model}": values for cell, values in RUNS.items() for model in ("lenet5", "vgg9")}
    folder = confirmed_study(tmp_path, study, runs)
    found = info_of(folder)
    assert list(dict.fromkeys(found.cells["of"])) == ["lenet5", "vgg9"]
    assert len(figures_accuracy.draw_accuracy(found).axes) == 4
    one = figures_accuracy.draw_accuracy(found, at_most=1)
    assert len(one.axes) == 2
    assert "1 more combinations" in one.get_suptitle().replace("\n", " ")
    gaps = figures_gaps.gaps_info(study, gap_table(study, load.confirmed(folder)))
    assert len(figures_gaps.draw_gaps(gaps, 1).axes) == 1


def test_gaps_and_shares_are_those_of_the_table(tmp_path: Path):
    study = study_of(["sgd"], [32, 64, 128], ["none", "mixup"])
    runs = RUNS | {"sgd-b64-none": [0.5, 0.5, 0.6]}
    table = gap_table(
        study, load.confirmed(confirmed_study(tmp_path, study, {k: v for k, v in runs.items() if "sgd" in k}))
    )
    rows = figures_gaps.gaps_info(study, table).rows
    gap = 100 * np.subtract(RUNS["sgd-b32-none"], RUNS["sgd-b128-none"])
    interval = scipy_stats.ttest_1samp(gap, 0).confidence_interval()
    assert list(rows["batch"]) == ["32 to 128"] * 2
    assert tuple(rows.loc[0, ["value", "low", "high"]]) == pytest.approx((gap.mean(), *interval))
    shares = figures_gaps.shares_info(study, table).rows
    left = 100 * np.subtract(RUNS["sgd-b32-none"], RUNS["sgd-b128-mixup"])
    assert list(shares["notion"]) == ["closed", "narrowed"]
    assert shares.loc[0, "value"] == pytest.approx(100 * (1 - left.mean() / gap.mean()))
    assert figures_gaps.draw_shares(figures_gaps.shares_info(study, table)).axes[0].get_xlabel().startswith("%")
    with pytest.raises(NothingToDraw, match="no share"):
        figures_gaps.shares_info(study, table[table["smoothing"] == "none"])
    with pytest.raises(NothingToDraw, match="no two batch sizes"):
        figures_gaps.gaps_info(study, table.iloc[:0])


def test_intervals_wider_than_all_accuracies_are_cut_off():
    row = {"of": "", "optimizer": "sgd", "smoothing": "none", "batch": "32 to 128", "notion": "gap", "n": 2}
    rows = pd.DataFrame([row | {"value": 30.0, "low": -400.0, "high": 460.0}])
    figure = figures_gaps.draw_gaps(figures_gaps.Intervals(STUDY, rows))
    assert figure.axes[0].get_xlim() == pytest.approx((-110, 110))
    assert "Cut off" in figure.get_suptitle()
