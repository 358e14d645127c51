"""Landscapes from constructed files and frames: what is read, what is shown, and that it is drawn whatever is missing."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.figures import landscape as figures_landscape
from lbstudy.analysis.figures import planes as figures_planes
from lbstudy.analysis.figures.landscape import draw_interpolation, draw_line, draw_widths, interpolation_info, line_info
from lbstudy.analysis.figures.planes import draw_plane, draw_surface, draw_trajectory, plane_info, trajectory_info
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.minima import results
from lbstudy.analysis.minima.compute import LandscapeSettings, keep_settings
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Cell, StudySpec
from tests.confirmed_runs import add_run, confirmed_study, study_of

SETTINGS = {"directions": 2, "normalisation": "filter", "biases_and_norms": False, "samples": 100, "seed": 3}
LINE = np.linspace(-1, 1, 9)
GRID = np.linspace(-1, 1, 5)
STUDY = study_of(["sgd", "kfac"], [16, 64], ["none", "mixup"])
Loss = Callable[[pd.DataFrame], pd.Series]


def points_of(cell: Cell, repeat: int, coordinates: pd.DataFrame, loss: Loss, **changes: object) -> pd.DataFrame:
    """The points around one run as from `results.landscape`; accuracy is exp(-loss), NaN where the loss is NaN."""
    train = loss(coordinates)
    metrics = {
        "train_loss": train, "train_accuracy": np.exp(-train), "test_loss": train + 0.5,
        "test_accuracy": np.exp(-train) / 2, "train_samples": 100.0, "test_samples": 50.0,
    }  # fmt: skip
    run = {
        "cell": cell.name, "optimizer": cell.optimizer, "batch_size": cell.batch_size, "smoothing": cell.smoothing,
        "number": repeat, "trial": 0, "repeat": repeat, "rank": 0, "published": False,
    } | changes  # fmt: skip
    return coordinates.assign(**metrics, **run).astype({"rank": "Int64"})


def lines(study: StudySpec, loss: Loss, repeats: int = 2, directions: int = 2, a: np.ndarray = LINE) -> pd.DataFrame:
    grid = pd.DataFrame({"direction": np.repeat(range(directions), len(a)), "a": np.tile(a, directions)})
    return pd.concat(
        [points_of(c, r, grid, lambda at, r=r: loss(at) * (r + 1)) for c in study.list_cells() for r in range(repeats)],
        ignore_index=True,
    )


def planes(study: StudySpec, loss: Loss) -> pd.DataFrame:
    grid = pd.DataFrame({"a": np.repeat(GRID, len(GRID)), "b": np.tile(GRID, len(GRID))})
    return pd.concat([points_of(c, 0, grid, loss) for c in study.list_cells()], ignore_index=True)


def bowl(points: pd.DataFrame) -> pd.Series:
    """(1 + direction) a^2: along directions 0 and 1 and repeats 0 and 1, factors 1, 2, 2 and 4."""
    return points["a"] ** 2 * (1 + points["direction"])


def dish(points: pd.DataFrame) -> pd.Series:
    return 0.1 + points["a"] ** 2 + 4 * points["b"] ** 2


def at(info: figures_landscape.Curves, metric: str, a: float, cell: str = "sgd-b16-none") -> pd.Series:
    found = info.points[(info.points["cell"] == cell) & (info.points["metric"] == metric) & (info.points["a"] == a)]
    return found.squeeze()


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def rendered(figure: Figure) -> int:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=30)
    return len(out.getvalue())


def test_a_line_shows_median_and_quartiles_over_directions_and_seeds() -> None:
    info = line_info(STUDY, lines(STUDY, bowl), SETTINGS)
    found = at(info, "train_loss", 0.5)
    assert (found["low"], found["median"], found["high"]) == (0.25, 0.5, 0.5)  # of 0.25, 0.5, 0.5, 1
    assert (found["n"], found["lost"]) == (4, 0)
    assert at(info, "test_loss", 0.0)["median"] == 0.5
    assert at(info, "train_accuracy", 1.0)["median"] == pytest.approx(np.exp(-2))


def test_what_is_not_finite_is_worst_of_all_and_stays() -> None:
    def broken(points: pd.DataFrame) -> pd.Series:
        lost = (points["a"] > 0.5) | ((points["a"] < -0.5) & (points["direction"] == 1))
        return bowl(points).mask(lost, np.nan).mask(points["a"] == 1, np.inf)

    info = line_info(STUDY, lines(STUDY, broken), SETTINGS)
    everywhere, half = at(info, "train_loss", 0.75), at(info, "train_loss", -0.75)
    assert np.isinf(everywhere["median"])
    assert everywhere["lost"] == 1
    assert at(info, "train_accuracy", 0.75)["median"] == -np.inf
    assert half["lost"] == 0.5
    assert np.isinf(half["high"])
    assert half["low"] == 0.75**2
    assert "NaN or infinite" in texts(draw_line(info))
    assert "NaN or infinite" in texts(draw_widths(info))


def test_few_lost_curves_are_crosses_and_leave_the_median_finite() -> None:
    frame = lines(STUDY, bowl, directions=3)
    frame.loc[(frame["direction"] == 2) & (frame["a"] == 1) & (frame["repeat"] == 1), "train_loss"] = np.nan
    info = line_info(STUDY, frame, SETTINGS)
    found = at(info, "train_loss", 1.0)
    assert found["lost"] == pytest.approx(1 / 6)
    assert found["median"] == 2.5  # of 1, 2, 2, 3, 4 and NaN
    assert "some curves" in texts(draw_line(info))


def test_only_the_best_configurations_count() -> None:
    frame = lines(STUDY, bowl)
    other = frame.assign(rank=1, train_loss=99.0).astype({"rank": "Int64"})
    both = line_info(STUDY, pd.concat([frame, other]), SETTINGS)
    pd.testing.assert_frame_equal(both.points, line_info(STUDY, frame, SETTINGS).points)
    with pytest.raises(NothingToDraw, match="what are now the best"):
        line_info(STUDY, other, SETTINGS)


def test_the_note_says_directions_samples_and_what_is_incomplete() -> None:
    frame = lines(STUDY, bowl)
    frame = frame[~((frame["cell"] == "kfac-b16-none") & (frame["repeat"] == 1) & (frame["direction"] == 1))]
    frame.attrs["left_out"] = ["landscape/line/x/0000/000.csv"]
    info = line_info(STUDY, frame, SETTINGS)
    assert info.curves == "n = 2 random directions × 2 seeds"
    for part in ("filter-normalised", "weights only", "seed 3", "100 training and 50 test samples",
                 "kfac-b16-none run 1 (9 of 18 points)", "x/0000/000.csv"):  # fmt: skip
        assert part in info.note
    assert line_info(STUDY, lines(STUDY, bowl), {}).note == "Evaluated on 100 training and 50 test samples."


def test_an_interpolation_has_the_solutions_where_they_are() -> None:
    large = [cell for cell in STUDY.list_cells() if cell.batch_size == 64]
    a = pd.DataFrame({"a": np.linspace(-0.5, 1.5, 9)})
    frame = pd.concat([points_of(c, r, a, lambda at: at["a"] * (1 - at["a"]) + 1) for c in large for r in range(3)])
    info = interpolation_info(STUDY, frame)
    assert at(info, "train_loss", 0.0, "sgd-b64-none")["median"] == 1
    assert at(info, "train_loss", 0.5, "sgd-b64-none")["median"] == 1.25
    figure = draw_interpolation(info)
    assert "n = 3 seeds" in texts(figure)
    assert "Do not read off flatness" in " ".join(texts(figure).split())
    vertical = [line.get_xdata()[0] for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert vertical == [0, 1]


def test_a_plane_is_the_right_way_round_and_keeps_nan_and_what_is_missing_apart() -> None:
    frame = planes(STUDY, dish)
    here = frame["cell"] == "sgd-b16-none"
    frame.loc[here & (frame["a"] == 1), "train_loss"] = np.nan
    frame = frame[~(here & (frame["a"] == -1) & (frame["b"] == 1))]
    info = plane_info(STUDY, frame, SETTINGS)
    plane = info.planes["sgd-b16-none"]
    assert plane.loss[list(GRID).index(0.5), list(GRID).index(0.0)] == pytest.approx(0.1 + 4 * 0.25)  # b, a
    assert np.isnan(plane.loss[:, -1]).all()
    assert not plane.missing[:, -1].any()
    assert plane.missing[-1, 0]
    assert plane.missing.sum() == 1
    assert "sgd-b16-none run 0 (24 of 25 points)" in info.note
    for draw in (draw_plane, draw_surface):
        assert "NaN or infinite" in texts(draw(info))


def test_a_plane_is_that_of_the_first_seed() -> None:
    later = planes(STUDY, dish).assign(repeat=1, number=5, train_loss=7.0)
    both = plane_info(STUDY, pd.concat([later, planes(STUDY, dish)]), SETTINGS)
    assert {(plane.repeat, plane.number) for plane in both.planes.values()} == {(0, 0)}
    assert {plane.number for plane in plane_info(STUDY, later, SETTINGS).planes.values()} == {5}


def test_a_trajectory_has_its_path_and_its_shares() -> None:
    path = {"path": [[3, 1], [2, 2], [0, 0]], "explained": (0.75, 0.2)}
    info = trajectory_info(STUDY, planes(STUDY, dish), {("sgd-b16-none", 0): path})
    assert info.paths["sgd-b16-none"].tolist() == path["path"]
    assert set(info.paths) == {"sgd-b16-none"}
    cell = planes(STUDY, dish)["cell"] == "sgd-b16-mixup"
    without = draw_trajectory(trajectory_info(STUDY, planes(STUDY, dish)[~cell], {}))
    (empty,) = [axes for axes in without.axes if "no landscape" in [text.get_text() for text in axes.texts]]
    assert len(empty.get_xticks()) == 0
    shown = " ".join(texts(draw_trajectory(info)).split())
    assert "component 1 (75%)" in shown
    assert "component 2 (20%)" in shown
    assert "No path: sgd-b16-mixup" in info.planes.note


TWO_CELLS, ONE_CELL = study_of(["sgd"], [16, 64], ["none"]), study_of(["sgd"], [16], ["none"])
PARTS = [
    (TWO_CELLS, "whole"),
    (TWO_CELLS, "two points"),
    (TWO_CELLS, "cell missing"),
    (ONE_CELL, "whole"),
    (ONE_CELL, "lost"),
]


@pytest.mark.parametrize(("study", "part"), PARTS)
def test_every_figure_is_drawn_whatever_there_is(study: StudySpec, part: str) -> None:
    def only(frame: pd.DataFrame) -> pd.DataFrame:
        if part == "two points":
            return frame.groupby(["cell", "number"]).head(2)
        if part == "lost":
            return frame.assign(train_loss=np.nan, train_accuracy=np.nan, test_loss=np.inf)
        return frame[frame["cell"] != "sgd-b16-none"] if part == "cell missing" else frame

    line, plane = only(lines(study, bowl)), only(planes(study, dish))
    drawn = [
        draw_line(line_info(study, line, SETTINGS)),
        draw_widths(line_info(study, line, {})),
        draw_interpolation(interpolation_info(study, line)),
        draw_plane(plane_info(study, plane, {})),
        draw_surface(plane_info(study, plane, {})),
        draw_trajectory(trajectory_info(study, plane, {})),
    ]
    assert all(rendered(figure) > 3000 for figure in drawn)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return confirmed_study(tmp_path / "study", STUDY, {"sgd-b16-none": [0.8, 0.7], "sgd-b64-none": [0.6]})


def write_points(
    folder: StudyFolder, kind: results.Kind, cell: str, number: int, frame: pd.DataFrame, part: int = 0
) -> Path:
    where = folder.path / "landscape" / kind / cell / f"{number:04d}"
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"{part:03d}.csv"
    columns = [*results.COORDINATES[kind], *results.POINT_METRICS]
    path.write_text(frame[columns].to_csv(index=False, na_rep="nan"))
    return path


def test_parts_are_put_together_and_come_back_with_nan_and_infinity(folder: StudyFolder) -> None:
    cell = STUDY.list_cells()[0]
    whole = lines(STUDY, bowl)
    whole = whole[(whole["cell"] == cell.name) & (whole["repeat"] == 1)].reset_index(drop=True)
    whole.loc[0, "train_loss"], whole.loc[1, "train_loss"], whole.loc[0, "train_accuracy"] = np.nan, np.inf, np.nan
    write_points(folder, "line", cell.name, 1, whole.iloc[:10], 0)
    write_points(folder, "line", cell.name, 1, whole.iloc[10:], 1)
    read = results.landscape(folder, "line")
    columns = ["cell", "number", "repeat", "rank", "direction", "a", "train_loss", "train_accuracy"]
    pd.testing.assert_frame_equal(read[columns], whole[columns], check_dtype=False)
    assert read.attrs["left_out"] == []


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\n", None, b"direction,a\n0,"])
def test_a_damaged_part_is_named_and_left_out(folder: StudyFolder, content: bytes | None) -> None:
    frame = lines(STUDY, bowl)
    sound = frame[(frame["cell"] == "sgd-b16-none") & (frame["repeat"] == 0)]
    write_points(folder, "line", "sgd-b16-none", 0, sound)
    damaged = write_points(folder, "line", "sgd-b16-none", 1, sound)
    damaged.write_bytes(damaged.read_bytes()[:-3] if content is None else content)
    write_points(folder, "line", "sgd-b16-none", 9, sound)  # of no run
    (folder.path / "landscape" / "line" / "settings.json").write_bytes(b"{")
    read = results.landscape(folder, "line")
    assert read.attrs["left_out"] == [
        *(f"landscape/line/sgd-b16-none/{run}/000.csv" for run in ("0001", "0009")), "landscape/line/settings.json",
    ]  # fmt: skip
    assert len(read) == len(sound)
    assert "0001/000.csv" in line_info(STUDY, read, {}).note


def test_interpolations_of_an_older_rule_are_left_out_and_named_and_lines_are_not(folder: StudyFolder) -> None:
    frame = lines(STUDY, bowl)
    frame = frame[(frame["cell"] == "sgd-b64-none") & (frame["repeat"] == 0) & (frame["direction"] == 0)]
    for kind in ("interpolate", "line"):
        write_points(folder, kind, "sgd-b64-none", 0, frame)
        (folder.path / "landscape" / kind / "settings.json").write_text(json.dumps(SETTINGS))  # of no rule: the first
    assert len(results.landscape(folder, "line")) == len(LINE)
    old = results.landscape(folder, "interpolate")
    assert (len(old), old.attrs["left_out"]) == (0, [])
    assert old.attrs["outdated"] == ["landscape/interpolate/sgd-b64-none/0000/000.csv"]
    with pytest.raises(NothingToDraw, match="older rule .running variances now go geometrically.*--kind interpolate"):
        interpolation_info(STUDY, old)
    settings = LandscapeSettings.model_validate(SETTINGS)
    keep_settings(folder, "landscape/line", settings)
    assert json.loads((folder.path / "landscape" / "line" / "settings.json").read_text()) == SETTINGS
    with pytest.raises(StudyError, match="made by rule 1, and the rule is 2 now: running variances"):
        keep_settings(folder, "landscape/interpolate", settings)
    (folder.path / "landscape" / "interpolate" / "settings.json").write_text(json.dumps(SETTINGS | {"rule": 2}))
    keep_settings(folder, "landscape/interpolate", settings)
    assert len(results.landscape(folder, "interpolate")) == len(LINE)


def test_settings_and_paths_come_back_or_are_missing(folder: StudyFolder) -> None:
    assert results.landscape_settings(folder, "line") == {}
    where = folder.path / "landscape" / "trajectory"
    for number, text in enumerate(['{"path": [[1, 2], [0, 0]], "explained": [0.5, 0.25]}', '{"path": [[1]]}', "{"]):
        (where / "sgd-b16-none" / f"{number:04d}").mkdir(parents=True)
        (where / "sgd-b16-none" / f"{number:04d}" / "path.json").write_text(text)
    (where / "settings.json").write_text(json.dumps(SETTINGS))
    assert results.landscape_settings(folder, "trajectory") == SETTINGS
    expected = {("sgd-b16-none", 0): {"path": [(1, 2), (0, 0)], "explained": (0.5, 0.25)}}
    assert results.trajectories(folder) == expected


def test_without_landscapes_every_figure_names_its_command(folder: StudyFolder) -> None:
    drawings = {
        d.name: d for d in figures.draw_all(folder) if d.name.startswith(("landscape", "spectral", "sharpness"))
    }
    assert len(drawings) == 8
    for name, drawing in drawings.items():
        assert drawing.figure is None
        kind = {"surface": "plane", "widths": "line"}.get(name.partition("_")[2], name.partition("_")[2])
        expected = (
            f"`lbstudy landscape STUDY --kind {kind}`" if name.startswith("landscape") else "`lbstudy sharpness STUDY`"
        )
        assert expected in drawing.reason


def test_the_figures_of_a_folder_are_drawn_from_its_files(folder: StudyFolder) -> None:
    add_run(folder, "sgd-b64-none", [{"test_accuracy": 0.7}], 1, trial=0)
    frame, plane = lines(STUDY, bowl), planes(STUDY, dish)
    for cell in ("sgd-b16-none", "sgd-b64-none"):
        write_points(folder, "line", cell, 0, frame[(frame["cell"] == cell) & (frame["repeat"] == 0)])
        write_points(folder, "plane", cell, 0, plane[plane["cell"] == cell])
        write_points(folder, "trajectory", cell, 0, plane[plane["cell"] == cell])
    drawn = {d.name for d in figures.draw_all(folder) if d.figure is not None}
    assert {"landscape_line", "landscape_widths", "landscape_plane", "landscape_surface", "landscape_trajectory",
            "sharpness_accuracy"} <= drawn  # fmt: skip
    assert "landscape_interpolate" not in drawn


def test_contours_are_log_spaced_over_the_range_of_the_sources() -> None:
    levels = figures_planes.LEVELS
    assert (levels[0], levels[-1]) == pytest.approx((0.1, 10))
    assert np.diff(np.log(levels)) == pytest.approx(np.full(12, np.log(100) / 12))
