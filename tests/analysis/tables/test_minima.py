"""The table of minima against parabolas, whose widths are known, and constructed correlations; and its figures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, spearmanr
from typer.testing import CliRunner

from lbstudy.analysis import load
from lbstudy.analysis.figures import sharpness as figures_sharpness
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.minima import results
from lbstudy.analysis.minima.compute import keep_settings
from lbstudy.analysis.minima.hessian import Estimate, SpectralDensity
from lbstudy.analysis.minima.sharpness import Sharpness, SharpnessSpec
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.analysis.tables.minima import correlations, line_measures, list_left_out, runs
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from tests.analysis.figures.test_landscape import LINE, lines, rendered, texts, write_points
from tests.confirmed_runs import confirmed_study, study_of

STUDY = study_of(["sgd", "kfac"], [16, 64], ["none", "mixup"])
CELLS = [cell.name for cell in STUDY.list_cells()]
FINE = np.linspace(-1, 1, 401)
DENSITY = SpectralDensity((0.0, 4.0), (0.75, 0.25), 0.1)


def sharpness_of(eigenvalue: float, **changes: object) -> Sharpness:
    """A model's sharpness: the top eigenvalue as given, everything else a multiple of it."""
    rise = Estimate(eigenvalue / 100, 0.001)
    pair = (eigenvalue, eigenvalue / 4)
    of_draws = tuple(Estimate(value / 10, value / 200) for value in pair)
    found = Sharpness(
        0.1, 0.01, 100, 500, (Estimate(eigenvalue, 0.1), Estimate(1.0, 0.1)), Estimate(2 * eigenvalue, 0.5), DENSITY,
        pair, of_draws, pair, of_draws, rise, rise, rise, rise, rise, rise, SharpnessSpec(),
    )  # fmt: skip
    return replace(found, **changes)


def confirmed_frame(accuracies: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {
            "cell": cell.name, "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
            "number": repeat, "trial": 0, "repeat": repeat, "rank": 0, "published": False, "status": "completed",
            "test_accuracy": accuracy, "clean_train_loss": 1 - accuracy,
        }
        for cell in STUDY.list_cells()
        for repeat, accuracy in enumerate(accuracies.get(cell.name, []))
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"rank": "Int64"})


def sharpness_frame(eigenvalues: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"cell": cell, "number": number, **sharpness_of(value).row()}
        for cell, values in eigenvalues.items()
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=None if rows else load.CONFIRMED_KEY)


NO_LINES = lines(STUDY, lambda at: at["a"] ** 2, repeats=1).iloc[:0]


def test_widths_and_mean_rise_of_parabolas() -> None:
    """L = k a^2 has W_c = 2 sqrt(c / k) and a mean rise of k / 12 within 0.5; k is 4 and 8, in repeat 1 twice that."""
    frame = line_measures(lines(STUDY, lambda at: 4 * at["a"] ** 2 * (1 + at["direction"]), a=FINE))
    first, second = (frame[(frame["cell"] == "kfac-b64-mixup") & (frame["number"] == n)].squeeze() for n in (0, 1))
    for run, k in ((first, np.array([4, 8])), (second, np.array([8, 16]))):
        assert run["width_0.1"] == pytest.approx(np.mean(2 * np.sqrt(0.1 / k)), rel=1e-3)
        assert run["width_1"] == pytest.approx(np.mean(2 * np.sqrt(1 / k)), rel=1e-3)
        assert run["mean_rise"] == pytest.approx(np.mean(k / 12), rel=1e-3)
        assert run["beyond"] == 0


def test_a_valley_wider_than_the_line_is_a_lower_bound_and_a_lost_loss_an_infinite_rise() -> None:
    wide = line_measures(lines(STUDY, lambda at: 0.5 * at["a"] ** 2, repeats=1)).iloc[0]
    assert (wide["width_1"], wide["beyond"]) == (2, 1)
    lost = line_measures(lines(STUDY, lambda at: (at["a"] ** 2).mask(at["a"] > 0.25, np.nan), repeats=1)).iloc[0]
    assert lost["mean_rise"] == np.inf
    assert lost["width_1"] == pytest.approx(1.25)  # from -1 to the last point that is finite
    table = minima_table.minima_table(
        STUDY,
        runs(confirmed_frame({CELLS[0]: [0.9]}), sharpness_frame({}), lines(STUDY, lambda at: 0.5 * at["a"] ** 2)),
    )
    assert table["note"][0] == "width_1 is a lower bound"


def test_runs_that_were_not_measured_are_counted_and_their_cells_named() -> None:
    confirmed = confirmed_frame({CELLS[0]: [0.9, 0.8], CELLS[1]: [0.7]})
    all_lines = lines(STUDY, lambda at: at["a"] ** 2)
    for measured, missing in (
        ({CELLS[0]: [1.0]}, "2 of 3 runs (in every cell)"),
        ({CELLS[0]: [1.0], CELLS[1]: [1.0]}, f"1 of 3 runs ({CELLS[0]})"),
    ):
        sharpness = sharpness_frame(measured)
        assert list_left_out(runs(confirmed, sharpness, all_lines), sharpness, all_lines) == [
            f"missing: sharpness of {missing}; run `lbstudy sharpness STUDY`"
        ]
    none = sharpness_frame({})
    assert list_left_out(runs(confirmed, none, NO_LINES), none, NO_LINES) == [
        "missing: sharpness; run `lbstudy sharpness STUDY`",
        "missing: widths and mean rise; run `lbstudy landscape STUDY --kind line`",
    ]


def test_lines_with_fewer_points_than_others_are_named() -> None:
    confirmed, whole = confirmed_frame({CELLS[0]: [0.9, 0.8]}), lines(STUDY, lambda at: at["a"] ** 2)
    cut = whole.drop(whole.index[(whole["cell"] == CELLS[0]) & (whole["number"] == 1)][-3:])
    sharpness = sharpness_frame({CELLS[0]: [1.0, 1.0]})
    assert list_left_out(runs(confirmed, sharpness, cut), sharpness, cut) == [
        f"missing: points of the lines of {CELLS[0]}/0001; run `lbstudy landscape STUDY --kind line`"
    ]


def test_a_copy_of_a_line_is_no_further_direction(folder: StudyFolder) -> None:
    frame = lines(STUDY, lambda at: 4 * at["a"] ** 2, a=LINE)
    path = write_points(folder, "line", CELLS[0], 0, frame[(frame["cell"] == CELLS[0]) & (frame["repeat"] == 0)])
    path.with_name("x y.csv").write_bytes(path.read_bytes())
    read = results.landscape(folder, "line")
    assert read.attrs["left_out"] == [f"landscape/line/{CELLS[0]}/0000/x y.csv"]
    assert len(line_measures(read)) == 1


def test_directions_and_lines_of_which_points_are_missing_do_not_spoil_the_rest() -> None:
    frame = lines(STUDY, lambda at: 4 * at["a"] ** 2 * (1 + 9 * at["direction"]), repeats=1, a=FINE)
    cut = frame[~((frame["direction"] == 1) & (frame["a"] > 0.5))]
    assert line_measures(cut)["width_1"][0] == pytest.approx(1, rel=1e-3)  # of direction 0 alone
    assert len(line_measures(frame[frame["a"] > 0.2])) == 0
    short = line_measures(frame[frame["a"].abs() < 0.4]).iloc[0]
    assert np.isnan(short["mean_rise"])


def test_the_table_has_mean_and_spread_over_seeds_next_to_test_accuracy() -> None:
    confirmed = confirmed_frame({CELLS[0]: [0.9, 0.8, 0.7], CELLS[1]: [0.5]})
    confirmed.loc[2, "status"] = "diverged"
    confirmed = pd.concat([confirmed, confirmed.iloc[:1].assign(number=9, test_accuracy=0.0, rank=1)])
    found = runs(confirmed, sharpness_frame({CELLS[0]: [10.0, 20.0, 99.0], CELLS[1]: []}), NO_LINES)
    table = minima_table.minima_table(STUDY, found)
    first = table.iloc[0]
    assert (first["n"], first["test_accuracy"], first["eigenvalue_1"]) == (2, pytest.approx(0.85), 15)
    assert first["clean_train_loss"] == pytest.approx(0.15)
    assert first["eigenvalue_1_sd"] == pytest.approx(np.std([10, 20], ddof=1))
    assert (first["eigenvalue_1_error"], first["trace"], first["trace_error"]) == (0.1, 30, 0.5)
    assert (first["keskar_full_0.001"], first["keskar_full_0.0005"]) == (15, 3.75)
    assert (first["keskar_subspace_0.001"], first["keskar_subspace_0.001_error"]) == (1.5, 0.1)  # the largest error
    assert list(table["note"][:3]) == ["", "not measured", "no confirmed run"]
    assert not {"width_1", "mean_rise"} & set(table)  # no lines
    assert len(table) == len(CELLS)
    assert "15 ± 7.07" in tables.render(table, "markdown")


def test_some_seeds_without_a_measurement_are_said() -> None:
    found = runs(confirmed_frame({CELLS[0]: [0.9, 0.8]}), sharpness_frame({CELLS[0]: [10.0]}), NO_LINES)
    row = minima_table.minima_table(STUDY, found).iloc[0]
    assert row["note"] == "sharpness: 1 of 2 seeds"
    assert row["test_accuracy"] == pytest.approx(0.85)  # of both


def test_the_correlation_is_spearmans_and_says_what_it_means() -> None:
    accuracies = [0.9, 0.8, 0.85, 0.7, 0.6, 0.75, 0.5, 0.55]
    eigenvalues = [1.0, 3.0, 2.0, 5.0, 4.0, 6.0, 8.0, 7.0]
    found = runs(
        confirmed_frame({c: [a] for c, a in zip(CELLS, accuracies, strict=True)}),
        sharpness_frame({c: [e] for c, e in zip(CELLS, eigenvalues, strict=True)}), NO_LINES,
    )  # fmt: skip
    table = correlations(minima_table.minima_table(STUDY, found)).set_index("measure")
    row = table.loc["top Hessian eigenvalue"]
    assert row["correlation"] == pytest.approx(spearmanr(accuracies, eigenvalues)[0])
    assert (row["n"], row["large_is"], row["sharper_is"], row["note"]) == (8, "sharp", "worse", "")


def test_wide_valleys_that_test_well_mean_that_sharper_is_worse_and_few_cells_a_caution() -> None:
    table = pd.DataFrame(
        {"test_accuracy": np.arange(7) / 10, "width_1": [1.0, 2, 4, 3, 5, 6, 7], "trace": [1.0, 2, 4, 3, 5, 6, 7]}
    )
    found = correlations(table).set_index("measure")
    assert found.loc["width of the valley at +1", "sharper_is"] == "worse"
    assert found.loc["Hessian trace", "sharper_is"] == "better"
    assert (found["note"] == "7 cells; the interval holds from about eight pairs on").all()
    uncertain = correlations(table.assign(trace=[1.0, 5, 2, 7, 3, 6, 4]))
    assert uncertain.set_index("measure").loc["Hessian trace", "sharper_is"] == ""


def test_densities_are_means_over_seeds_and_the_scatter_has_a_point_per_cell() -> None:
    found = runs(
        confirmed_frame({CELLS[0]: [0.9, 0.8], CELLS[3]: [0.7, 0.6]}),
        sharpness_frame({CELLS[0]: [10.0, 20.0], CELLS[3]: [30.0, 40.0]}), NO_LINES,
    )  # fmt: skip
    other = SpectralDensity((1.0,), (1.0,), 0.5)
    info = figures_sharpness.densities_info(
        STUDY, found, {(CELLS[0], 0): DENSITY, (CELLS[0], 1): other, ("x", 0): DENSITY}
    )
    expected = (0.75 * norm.pdf(info.eigenvalues, 0, 0.1) + 0.25 * norm.pdf(info.eigenvalues, 4, 0.1)) / 2
    expected += norm.pdf(info.eigenvalues, 1, 0.5) / 2
    assert info.densities[CELLS[0]] == pytest.approx(expected)
    assert np.trapezoid(info.densities[CELLS[0]], info.eigenvalues) == pytest.approx(1, abs=1e-3)
    assert info.seeds == {CELLS[0]: 2}
    figure = figures_sharpness.draw_densities(info)
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert rendered(figure) > 3000

    scatter = figures_sharpness.sharpness_accuracy_info(STUDY, minima_table.minima_table(STUDY, found))
    assert scatter.correlations["eigenvalue_1"].value == pytest.approx(-1)
    figure = figures_sharpness.draw_sharpness_accuracy(scatter)
    assert "r = -1.00, 2 cells" in texts(figure)
    assert len(figure.axes[0].containers) == 2
    assert rendered(figure) > 3000


def test_spectra_far_apart_are_all_seen() -> None:
    found = runs(
        confirmed_frame({CELLS[0]: [0.9], CELLS[3]: [0.7]}), sharpness_frame({CELLS[0]: [1.0], CELLS[3]: [9e3]}), NO_LINES
    )  # fmt: skip
    narrow, wide = SpectralDensity((0.0, 30.0), (0.5, 0.5), 0.3), SpectralDensity((0.0, 9000.0), (0.5, 0.5), 90.0)
    info = figures_sharpness.densities_info(STUDY, found, {(CELLS[0], 0): narrow, (CELLS[3], 0): wide})
    for cell in (CELLS[0], CELLS[3]):  # the grid resolves the narrow one and spans the wide one
        assert np.trapezoid(info.densities[cell], info.eigenvalues) == pytest.approx(1, abs=5e-3)
    assert info.linear == 10
    figure = figures_sharpness.draw_densities(info)
    assert {axes.get_xscale() for axes in figure.axes} == {"symlog"}
    assert sorted(figure.axes[0].get_xticks()) == [-100, 0, 100, 1000]
    assert "Logarithmic beyond ±10" in figure.get_suptitle().replace("\n", " ")


def test_nothing_measured_is_nothing_to_draw() -> None:
    empty = runs(confirmed_frame({CELLS[0]: [0.9]}), sharpness_frame({}), NO_LINES)
    with pytest.raises(NothingToDraw, match="lbstudy sharpness STUDY"):
        figures_sharpness.densities_info(STUDY, empty, {})
    with pytest.raises(NothingToDraw, match="lbstudy sharpness STUDY"):
        figures_sharpness.sharpness_accuracy_info(STUDY, minima_table.minima_table(STUDY, empty))


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return confirmed_study(tmp_path / "study", STUDY, {CELLS[0]: [0.8, 0.7], CELLS[1]: [0.6]})


def write_sharpness(folder: StudyFolder, cell: str, number: int, text: str) -> None:
    (folder.path / "sharpness" / cell).mkdir(parents=True, exist_ok=True)
    (folder.path / "sharpness" / cell / f"{number:04d}.json").write_text(text)


def test_sharpness_comes_back_from_its_files_and_damaged_ones_are_named(folder: StudyFolder) -> None:
    whole = json.dumps(sharpness_of(12.0, loss=np.inf).as_json())
    for number, text in enumerate([whole, whole[:-40]]):
        write_sharpness(folder, CELLS[0], number, text)
    write_sharpness(folder, CELLS[1], 0, "[1]")
    write_sharpness(folder, CELLS[1], 1, json.dumps(sharpness_of(12.0).as_json() | {"loss": "low"}))
    write_sharpness(folder, CELLS[2], 0, whole)  # of no run
    (folder.path / "sharpness" / CELLS[0] / "0000 (copy).json").write_text(whole)
    read = results.sharpness(folder)
    assert read.attrs["left_out"] == [
        f"sharpness/{cell}/{number}.json"
        for cell, number in sorted(
            [(CELLS[0], "0000 (copy)"), (CELLS[0], "0001"), (CELLS[1], "0000"), (CELLS[1], "0001"), (CELLS[2], "0000")]
        )
    ]
    assert len(read) == 1
    assert read[["cell", "number", "repeat", "eigenvalue_1", "loss"]].to_numpy().tolist() == [
        [CELLS[0], 0, 0, 12.0, np.inf]
    ]
    assert results.spectral_densities(folder)[CELLS[0], 0] == DENSITY


def test_sharpness_of_an_older_rule_is_left_out_and_named_and_its_folder_not_added_to(folder: StudyFolder) -> None:
    new = sharpness_of(12.0).as_json()
    old = {key: value for key, value in new.items() if key != "rule"} | {
        "keskar_subspace": [1.0, 2.0], "keskar_subspace_published": [1.0, 2.0],
        "spec": {key: value for key, value in new["spec"].items() if key != "subspace_draws"},
    }  # fmt: skip
    write_sharpness(folder, CELLS[0], 0, json.dumps(new))
    write_sharpness(folder, CELLS[0], 1, json.dumps(old))
    read = results.sharpness(folder)
    assert (len(read), read.attrs["left_out"]) == (1, [])
    assert read.attrs["outdated"] == [f"sharpness/{CELLS[0]}/0001.json"]
    assert list(results.spectral_densities(folder)) == [(CELLS[0], 0)]
    result = CliRunner().invoke(app, ["table", str(folder.path), "sharpness"])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert f"made by an older rule: sharpness in 1 files, sharpness/{CELLS[0]}/0001.json" in told
    assert "remove the study's folder `sharpness` and run `lbstudy sharpness STUDY` to measure again" in told

    settings = folder.path / "sharpness" / "settings.json"
    settings.write_text(json.dumps(old["spec"], indent=2))
    with pytest.raises(
        StudyError, match="made by rule 1, and the rule is 2 now: Keskar's subspaces .* Remove the folder"
    ):
        keep_settings(folder, "sharpness", SharpnessSpec())
    settings.unlink()
    keep_settings(folder, "sharpness", SharpnessSpec())
    keep_settings(folder, "sharpness", SharpnessSpec())  # the same: no objection
    assert json.loads(settings.read_text()) == SharpnessSpec().model_dump(mode="json") | {"rule": 2}
    with pytest.raises(StudyError, match=r"holds results with samples 1000 \(now 7\)"):
        keep_settings(folder, "sharpness", SharpnessSpec(samples=7))


@pytest.mark.parametrize("format", ["table", "csv", "json", "markdown", "latex"])
def test_the_command_prints_the_table_and_which_side_is_sharp(folder: StudyFolder, format: str) -> None:
    write_sharpness(folder, CELLS[0], 0, json.dumps(sharpness_of(12.0).as_json()))
    write_sharpness(folder, CELLS[1], 0, "damaged")
    frame = lines(STUDY, lambda at: 4 * at["a"] ** 2, a=LINE)
    write_points(folder, "line", CELLS[0], 0, frame[(frame["cell"] == CELLS[0]) & (frame["repeat"] == 0)])
    for kind, expected in (("sharpness", "mixup"), ("correlations", "flat")):
        result = CliRunner().invoke(app, ["table", str(folder.path), kind, "--format", format])
        assert result.exit_code == 0, result.output
        assert expected in result.stdout
        assert "SHARP" in result.stderr
        assert f"sharpness/{CELLS[1]}/0000.json" in result.stderr
        if format == "json":
            assert len(json.loads(result.stdout)) > 5


def test_a_study_without_confirmed_runs_has_a_table_all_the_same(tmp_path: Path) -> None:
    folder = confirmed_study(tmp_path / "study", STUDY, {})
    found = runs(load.confirmed(folder), results.sharpness(folder), results.landscape(folder, "line"))
    table = minima_table.minima_table(STUDY, found)
    assert list(table["note"]) == ["no confirmed run"] * len(CELLS)
    assert correlations(table).empty


def test_the_command_says_how_to_measure_where_nothing_was(folder: StudyFolder) -> None:
    result = CliRunner().invoke(app, ["table", str(folder.path), "sharpness"])
    assert result.exit_code == 0
    assert "run `lbstudy sharpness STUDY`" in result.stderr
    assert "run `lbstudy landscape STUDY --kind line`" in result.stderr
