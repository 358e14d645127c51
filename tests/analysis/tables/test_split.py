"""The parts of the gap on constructed studies: they add up, their intervals cover, and what is missing is said."""

from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lbstudy.analysis import load
from lbstudy.analysis.tables import best, gaps, split
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import PARAMS, add_run, confirmed_frame, study_of

NAMES = ["same_epochs", "same_updates", "fewer_updates"]


def split_study(names: list[str] = NAMES, **changes: object) -> StudySpec:
    """SGD and K-FAC at 32 and 128, with and without Mixup."""
    study = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"], budget={"epochs": 4}, **changes)
    content = study.model_dump(by_alias=True, exclude_none=True)
    return StudySpec.model_validate(content | {"cells": content["cells"] | {"budget": names}})


STUDY = split_study()
CELLS = [cell.name for cell in STUDY.list_cells()]


def accuracies(seeds: int = 3, seed: int = 0) -> dict[str, list[float]]:
    """Of every cell, at random."""
    random = np.random.default_rng(seed)
    return {name: list(random.normal(0.6, 0.05, seeds)) for name in CELLS}


def table(path: Path, values: dict[str, list[float]]) -> dict[tuple[str, str, str], dict]:
    found = split.split_table(STUDY, confirmed_frame(path / "s", STUDY, values))
    assert len(found) == 2 * 2 * 2
    return {(row["optimizer"], row["smoothing"], row["budget"]): row for row in found.to_dict("records")}


def test_cells_are_those_that_are_runs_of_their_own():
    assert len(CELLS) == 8 + 4 + 4
    assert [name for name in CELLS if name.startswith("sgd") and "-none-" in name] == [
        "sgd-b32-none-same_epochs",
        "sgd-b128-none-same_epochs",
        "sgd-b128-none-same_updates",
        "sgd-b32-none-fewer_updates",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_parts_add_up_to_the_gap_and_are_what_they_are_called(seed: int, tmp_path: Path):
    values = accuracies(3, seed)
    for (optimizer, smoothing, way), row in table(tmp_path, values).items():
        small, large = (np.array(values[f"{optimizer}-b{size}-{smoothing}-same_epochs"]) for size in (32, 128))
        size = 128 if way == "same_updates" else 32
        between = np.array(values[f"{optimizer}-b{size}-{smoothing}-{way}"])
        updates, noise = (between - large, small - between)[:: 1 if way == "same_updates" else -1]
        for name, each in {"gap": small - large, "few_updates": updates, "less_noise": noise}.items():
            interval = scipy_stats.ttest_1samp(each, 0).confidence_interval(0.95)
            assert row[name] == pytest.approx(each.mean(), abs=1e-15)
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(tuple(interval), abs=1e-12)
        assert row["few_updates"] + row["less_noise"] == pytest.approx(row["gap"], abs=1e-15)
        assert row["small_accuracy"] - row["large_accuracy"] == pytest.approx(row["gap"], abs=1e-15)
        assert (row["n"], row["small_batch"], row["large_batch"], row["note"]) == (3, 32, 128, "")


def test_what_smoothing_repairs_is_paired_over_all_six_cells(tmp_path: Path):
    values = accuracies(5)
    row = table(tmp_path, values)["sgd", "mixup", "same_updates"]

    def cost(smoothing: str) -> np.ndarray:
        cell = f"sgd-b128-{smoothing}"
        return np.array(values[f"{cell}-same_updates"]) - np.array(values[f"{cell}-same_epochs"])

    each = cost("none") - cost("mixup")
    interval = scipy_stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert row["few_updates_repaired"] == pytest.approx(each.mean(), abs=1e-11)
    assert (row["few_updates_repaired_low"], row["few_updates_repaired_high"]) == pytest.approx(
        tuple(interval), abs=1e-11
    )
    assert row["repaired_n"] == 5


def test_all_numbers_of_a_row_are_over_the_repeats_that_its_three_cells_completed(tmp_path: Path):
    values = accuracies(4)
    values["sgd-b32-none-same_epochs"][0] = nan
    values["sgd-b128-none-same_updates"][3] = nan
    rows = table(tmp_path, values)
    row = rows["sgd", "none", "same_updates"]
    kept = {name: np.array(values[f"sgd-b{name}"])[1:3] for name in ("32-none-same_epochs", "128-none-same_epochs")}
    assert row["n"] == 2
    assert row["gap"] == pytest.approx((kept["32-none-same_epochs"] - kept["128-none-same_epochs"]).mean(), abs=1e-15)
    assert row["few_updates"] + row["less_noise"] == pytest.approx(row["gap"], abs=1e-15)
    assert "1 of 4 confirmed runs of sgd-b32-none-same_epochs diverged" in row["note"]
    assert "1 of 4 confirmed runs of sgd-b128-none-same_updates diverged" in row["note"]
    assert rows["sgd", "none", "fewer_updates"]["n"] == 3
    assert rows["sgd", "mixup", "same_updates"]["repaired_n"] == 2


def test_without_common_repeats_or_without_a_cell_there_are_no_parts(tmp_path: Path):
    values = accuracies(2)
    values["sgd-b32-none-same_epochs"][0] = values["sgd-b128-none-same_updates"][1] = nan
    del values["kfac-b128-none-same_updates"]
    rows = table(tmp_path, values)
    apart, lacking = rows["sgd", "none", "same_updates"], rows["kfac", "none", "same_updates"]
    for row in (apart, lacking):
        assert row["n"] == 0
        assert all(isnan(row[name]) for name in ("gap", "few_updates", "less_noise", "few_updates_low"))
    assert apart["small_accuracy"] == pytest.approx(values["sgd-b32-none-same_epochs"][1])  # alone
    assert "no repeats in common" in apart["note"]
    assert lacking["note"] == "kfac-b128-none-same_updates has no completed confirmed run"


def test_one_seed_has_parts_without_intervals(tmp_path: Path):
    for row in table(tmp_path, accuracies(1)).values():
        assert row["few_updates"] + row["less_noise"] == pytest.approx(row["gap"], abs=1e-15)
        assert all(isnan(row[f"{name}_low"]) for name in ("gap", "few_updates", "less_noise"))
        assert "one seed has no interval" in row["note"]


def test_differences_that_are_equal_at_every_seed_have_no_interval(tmp_path: Path):
    values = accuracies(3)
    values["sgd-b128-none-same_updates"] = [value + 1 / 360 for value in values["sgd-b128-none-same_epochs"]]
    values["sgd-b32-none-fewer_updates"] = values["sgd-b32-none-same_epochs"]
    rows = table(tmp_path, values)
    row, none = rows["sgd", "none", "same_updates"], rows["sgd", "none", "fewer_updates"]
    assert row["few_updates"] == pytest.approx(1 / 360)
    assert none["few_updates"] == 0
    assert isnan(row["few_updates_low"])
    assert isnan(none["few_updates_low"])
    assert not isnan(row["less_noise_low"])


def test_intervals_cover_the_truth():
    """Of three seeds, whose effect is common to the cells of a study: 95 % of the intervals hold the part's true cost."""
    random, studies, seeds = np.random.default_rng(0), 2000, 3
    small, large, between = STUDY.ends(STUDY.list_cells()[8])[0], STUDY.list_cells()[1], STUDY.list_cells()[8]
    truth = {"small": 0.70, "between": 0.68, "large": 0.60}
    hit = {"few_updates": 0, "less_noise": 0}
    for _ in range(studies):
        common = random.normal(0, 0.02, seeds)
        runs = pd.DataFrame({name: mean + common + random.normal(0, 0.01, seeds) for name, mean in truth.items()})
        one = split.Split(small, large, between, runs)
        for part, cost in (("few_updates", 0.08), ("less_noise", 0.02)):
            found = one.cost(part)  # type: ignore[arg-type]
            hit[part] += found.low <= cost <= found.high
    assert hit["few_updates"] / studies == pytest.approx(0.95, abs=0.015)  # its standard error is 0.005
    assert hit["less_noise"] / studies == pytest.approx(0.95, abs=0.015)


def test_the_cost_in_images_is_that_of_the_runs(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", STUDY)
    seen = {"same_epochs": 4000.0, "same_updates": 16000.0, "fewer_updates": 1000.0}
    for cell in STUDY.list_cells():
        key = {"factors": dict(cell.factors), "params": PARAMS}
        add_run(folder, cell.name, [{"val_accuracy": 0.9, "val_loss": 0.3}], **key)
        run = {"test_accuracy": 0.5, "images": seen[str(cell.values["budget"])]}
        add_run(folder, cell.name, [run], trial=0, **key)
    for row in split.split_table(STUDY, load.confirmed(folder)).to_dict("records"):
        assert (row["images"], row["between_images"]) == (4000, seen[row["budget"]])


def test_the_gap_is_that_of_the_study_s_own_budget_and_given_once(tmp_path: Path):
    """As in the study without the factor, to the last bit."""
    values = accuracies(3)
    found = gaps.gap_table(STUDY, confirmed_frame(tmp_path / "s", STUDY, values))
    plain = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"], budget={"epochs": 4})
    own = {name.removesuffix("-same_epochs"): runs for name, runs in values.items() if name.endswith("same_epochs")}
    expected = gaps.gap_table(plain, confirmed_frame(tmp_path / "plain", plain, own))
    assert set(found.pop("budget")) == {"same_epochs"}
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_every_other_factor_has_splits_of_its_own(tmp_path: Path):
    content = STUDY.model_dump(by_alias=True, exclude_none=True)
    study = StudySpec.model_validate(content | {"cells": content["cells"] | {"fixed.weight_decay": [0, 5e-4]}})
    random = np.random.default_rng(0)
    values = {cell.name: list(random.normal(0.6, 0.05, 3)) for cell in study.list_cells()}
    found = split.split_table(study, confirmed_frame(tmp_path / "s", study, values))
    assert list(found)[:4] == ["optimizer", "smoothing", "budget", "fixed.weight_decay"]
    assert len(found) == 16
    row = found[(found["budget"] == "same_updates") & (found["fixed.weight_decay"] == 5e-4)].iloc[0]
    ends = [np.array(values[f"sgd-b128-none-{name}-weight_decay=0.0005"]) for name in ("same_updates", "same_epochs")]
    assert row["few_updates"] == pytest.approx((ends[0] - ends[1]).mean(), abs=1e-15)


def test_a_study_that_asks_for_one_way_has_that_alone(tmp_path: Path):
    study = split_study(["same_epochs", "fewer_updates"])
    assert {cell.values["budget"] for cell in study.list_cells()} == {"same_epochs", "fewer_updates"}
    found = split.split_table(study, confirmed_frame(tmp_path / "s", study, {}))
    assert set(found["budget"]) == {"fewer_updates"}
    for style in ("csv", "json", "markdown", "latex"):
        assert best.render(found, style)


def test_a_study_that_asks_for_none_says_how_to():
    with pytest.raises(StudyError, match=r"does not split its gaps.*`cells.budget: \[same_epochs, same_updates\]`"):
        split.split_table(study_of(["sgd"], [32, 128], ["none"]), pd.DataFrame())
