"""`lbstudy compare`: several studies in one table."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.figures.compared import compared_info, draw_compared
from lbstudy.analysis.figures.style import COLOURS
from lbstudy.analysis.report import compare as comparison
from tests.confirmed_runs import confirmed_study, study_of
from tests.console.test_cli import lbstudy

SEEDS = {"first": [0.90, 0.92, 0.91], "second": [0.80, 0.83, 0.81]}


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Two studies, of which the second has a batch size more and another model, and SGD alone."""
    first = study_of(["sgd"], [32, 128], ["none"], name="first")
    second = study_of(["sgd"], [32, 128, 512], ["none"], name="second", model="vgg9", seed=3)
    for study in (first, second):
        accuracies = {
            cell.name: [accuracy - 1e-4 * cell.batch_size * (1 + 0.1 * repeat)
                        for repeat, accuracy in enumerate(SEEDS[study.name])]
            for cell in study.list_cells()
        }  # fmt: skip
        confirmed_study(tmp_path / study.name, study, accuracies)
    return [str(tmp_path / name) for name in SEEDS]


def compared(monkeypatch, capsys, *arguments: str) -> tuple[pd.DataFrame, str]:
    assert lbstudy(monkeypatch, "compare", *arguments, "--format", "csv") == 0
    captured = capsys.readouterr()
    return pd.read_csv(StringIO(captured.out)), captured.err


def test_rows_of_a_cell_stand_together(places: list[str], monkeypatch, capsys):
    best, told = compared(monkeypatch, capsys, *places)
    assert list(zip(best["study"], best["batch_size"], strict=True)) == [
        ("first", 32), ("second", 32), ("first", 128), ("second", 128), ("second", 512),
    ]  # fmt: skip
    assert best["test_accuracy"][1] == pytest.approx(sum(SEEDS["second"]) / 3 - 32e-4 * 1.1)
    assert "notice: the studies differ in model (lenet5, vgg9), seed (0, 3)" in told
    assert "notice: second has cells that others have not: sgd-b512-none" in told


def test_the_tables_are_those_of_each_study(places: list[str], monkeypatch, capsys):
    gaps, _ = compared(monkeypatch, capsys, *places, "--table", "gap")
    for place, name in zip(places, SEEDS, strict=True):
        assert lbstudy(monkeypatch, "table", place, "gap", "--format", "csv") == 0
        own = pd.read_csv(StringIO(capsys.readouterr().out))
        here = gaps[gaps["study"] == name].drop(columns="study").reset_index(drop=True)
        pd.testing.assert_frame_equal(here, own, check_dtype=False)


def test_verdicts(places: list[str], monkeypatch, capsys):
    claims, _ = compared(monkeypatch, capsys, *places, "--table", "claims")
    verdicts = claims[claims["claim"] == "A large batch generalises worse."].set_index("study")["verdict"]
    assert verdicts.to_dict() == {"first": "supported", "second": "supported"}
    assert len(claims) == 8


@pytest.mark.parametrize("table", ["best", "gap", "targets", "claims"])
@pytest.mark.parametrize("style", ["table", "json", "markdown", "latex"])
def test_every_table_in_every_format(places: list[str], table: str, style: str, monkeypatch, capsys):
    assert lbstudy(monkeypatch, "compare", *places, "--table", table, "--format", style) == 0
    text = capsys.readouterr().out
    assert "first" in text
    assert "second" in text
    if style == "json":
        assert {row["study"] for row in json.loads(text)} == {"first", "second"}


def test_the_figure_has_a_line_style_per_study_and_the_accuracies_of_the_table(places: list[str], monkeypatch, capsys):
    best, _ = compared(monkeypatch, capsys, *places)
    info = compared_info([(s.name, s.study, load.confirmed(s.folder)) for s in comparison.open_all(places)])
    merged = info.cells.merge(best, on=["study", "optimizer", "batch_size", "smoothing"])
    assert len(merged) == len(best) == len(info.cells)
    assert np.allclose(merged["value"], merged["test_accuracy"])
    assert np.allclose(merged["low"], merged["test_low"])
    (panel,) = draw_compared(info).axes
    lines = [line for line in panel.get_lines() if len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in lines] == [
        list(info.cells.loc[info.cells["study"] == name, "value"]) for name in SEEDS
    ]
    assert len({str(line.get_linestyle()) for line in lines}) == 2
    assert {line.get_color() for line in lines} == {COLOURS[0]}


def test_the_figure_is_written(places: list[str], tmp_path: Path, monkeypatch, capsys):
    assert lbstudy(monkeypatch, "compare", *places, "--figure", str(tmp_path / "both.svg")) == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()
    assert lbstudy(monkeypatch, "compare", *places, "--figure", "both.doc") == 2
    assert "both.doc: a figure ends in .svg, .png, .pdf" in capsys.readouterr().err


def test_studies_of_one_name_go_by_their_folders(tmp_path: Path, monkeypatch, capsys):
    study = study_of(["sgd"], [32], ["none"])
    places = [str(tmp_path / name) for name in ("a", "b")]
    for place in places:
        confirmed_study(Path(place), study, {"sgd-b32-none": [0.9]})
    best, told = compared(monkeypatch, capsys, *places)
    assert list(best["study"]) == places
    assert "tiny is the name of more than one study: they go by their folders" in told
    assert "the studies differ" not in told


def test_nothing_in_common_is_said(tmp_path: Path, monkeypatch, capsys):
    for name, batch_size in (("a", 32), ("b", 64)):
        study = study_of(["sgd"], [batch_size], ["none"], name=name)
        confirmed_study(tmp_path / name, study, {f"sgd-b{batch_size}-none": [0.9]})
    _, told = compared(monkeypatch, capsys, str(tmp_path / "a"), str(tmp_path / "b"))
    assert "notice: no cell is in all of the studies" in told


@pytest.mark.parametrize(
    ("which", "message"),
    [([0], "two studies or more"), ([0, 0], "is given twice"), ([0, None], "no study here")],
)
def test_bad_input_is_one_error(which: list[int | None], message: str, places: list[str], monkeypatch, capsys):
    arguments = ["/nowhere" if place is None else places[place] for place in which]
    assert lbstudy(monkeypatch, "compare", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
