"""The table and the figure of gradient noise scales, from constructed measurements."""

import json
from math import isnan
from pathlib import Path

import pandas as pd
import pytest

from lbstudy.analysis import stats
from lbstudy.analysis.figures import noise as figures_noise
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.minima import results
from lbstudy.analysis.tables import noise
from lbstudy.records.folder import StudyFolder
from tests.confirmed_runs import confirmed_study, study_of

STUDY = study_of(["sgd"], [32, 128], ["none", "mixup"])
SQUARED = [1.0, 1.2, 0.9]


def entry(smoothed: bool, size: int, trace: float, squared: float) -> dict[str, object]:
    return {
        "smoothed": smoothed, "batch_size": size, "batches": 16, "trace": trace, "trace_error": 1.0,
        "squared_norm": squared, "squared_norm_error": 0.1, "scale": trace / squared, "scale_error": 5.0,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Of the small plain cell three solutions and a model on the way; of the small mixed one a gradient that is zero."""
    folder = confirmed_study(tmp_path / "s", STUDY, {"sgd-b32-none": [0.9] * 3, "sgd-b32-mixup": [0.9]})
    for number, squared in enumerate(SQUARED):
        where = folder.path / "noise" / "sgd-b32-none" / f"{number:04d}"
        where.mkdir(parents=True)
        (where / "008.json").write_text(json.dumps([entry(False, 64, 100, squared), entry(False, 256, 100, squared)]))
    (folder.path / "noise/sgd-b32-none/0000/004.json").write_text(json.dumps([entry(False, 64, 100, 10.0)]))
    mixed = folder.path / "noise/sgd-b32-mixup/0000"
    mixed.mkdir(parents=True)
    smoothed = [entry(True, 64, 200, 2.0), entry(True, 256, 400, 2.0)]
    (mixed / "008.json").write_text(json.dumps([entry(False, 64, 100, -0.5), *smoothed]))
    return folder


def test_rows_are_about_solutions(folder: StudyFolder):
    rows = noise.noise_table(STUDY, results.noise(folder)).set_index(["batch_size", "smoothing", "gradient"])
    assert len(rows) == 6
    small = rows.loc[(32, "none", "plain")]
    expected = stats.ratio(pd.Series([100.0] * 3), pd.Series(SQUARED))
    assert (small["n"], small["noise_scale"]) == (3, pytest.approx(300 / sum(SQUARED)))
    assert (small["noise_scale_low"], small["noise_scale_high"]) == pytest.approx((expected.low, expected.high))
    assert small["falls_as"] == pytest.approx(1)
    assert rows.loc[(32, "mixup", "smoothed")]["falls_as"] == pytest.approx(0.5)
    assert isnan(rows.loc[(32, "mixup", "plain")]["noise_scale"])
    assert "cannot be told from zero" in rows.loc[(32, "mixup", "plain")]["note"]
    assert rows.loc[(128, "none", "plain")]["note"] == "not measured; `lbstudy noise` does"


def test_damaged_files_are_left_out(folder: StudyFolder):
    for name, text in {"005.json": "{", "006.json": "[]", "007.json": '[{"smoothed": false}]'}.items():
        (folder.path / "noise/sgd-b32-none/0001" / name).write_text(text)
    found = results.noise(folder)
    assert len(found.attrs["left_out"]) == 3
    assert len(found) == 10


def test_the_figure_has_the_course_and_the_batch_size(folder: StudyFolder):
    info = figures_noise.noise_scales_info(STUDY, results.noise(folder))
    plain = info.points[info.points["cell"] == "sgd-b32-none"]
    assert plain["epoch"].tolist() == [4, 8]
    assert plain["scale"].tolist() == [10, 100]
    figure = figures_noise.draw_noise_scales(info)
    assert [32] * 2 in [list(line.get_ydata()) for line in figure.axes[0].lines]
    with pytest.raises(NothingToDraw, match="lbstudy noise"):
        figures_noise.noise_scales_info(STUDY, results.noise(folder).head(0))
