"""Times to a target on constructed curves."""

from math import exp, inf, isnan, nan, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lbstudy.analysis import load
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import targets
from lbstudy.analysis.tables.targets import Target
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from tests.confirmed_runs import add_run, confirmed_study, study_of

STUDY = study_of(["kfac", "sgd"], [32, 128], ["none", "mixup"])


def curve(*losses: float) -> list[dict[str, float]]:
    """Loss per epoch, and an accuracy that is one minus it."""
    return [{"clean_train_loss": loss, "val_accuracy": 1 - loss} for loss in losses]


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """The baseline ends at 0.1, 0.2 and 0.15; at the large batch one of three reaches 0.2 in time."""
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    for repeat, losses in enumerate([(0.4, 0.15, 0.1), (0.4, 0.3, 0.2), (0.18, 0.3, 0.15)]):
        add_run(folder, "sgd-b32-none", curve(*losses), repeat, trial=0)
    for repeat, losses in enumerate([(0.5, 0.4, 0.3), (0.5, 0.2, 0.3), (0.5, nan)]):
        status = "diverged" if losses[-1] != losses[-1] else "completed"
        add_run(folder, "sgd-b128-none", curve(*losses), repeat, status, trial=0)
    add_run(folder, "sgd-b32-mixup", curve(0.1, 0.1), 0, trial=0)
    add_run(folder, "sgd-b32-mixup", curve(0.2), 1, "running", trial=0)
    return folder


def table(folder: StudyFolder, **given: float) -> dict[tuple[str, str], dict]:
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    found = targets.targets_table(STUDY, confirmed, epochs, targets.choose_targets(STUDY, confirmed, **given))
    cells = found["optimizer"] + "-b" + found["batch_size"].astype(str) + "-" + found["smoothing"]
    return dict(zip(zip(cells, found["metric"], strict=True), found.to_dict("records"), strict=True))


def test_default_targets_are_what_the_worst_baseline_run_ends_with(folder: StudyFolder):
    assert targets.baseline(STUDY).name == "sgd-b32-none"
    chosen = targets.choose_targets(STUDY, load.confirmed(folder))
    assert chosen == [Target("clean_train_loss", 0.2), Target("val_accuracy", 0.8)]
    row = table(folder)["sgd-b32-none", "clean_train_loss"]
    assert (row["n"], row["reached"]) == (3, 3)
    assert (row["steps"], row["epochs"], row["seconds"]) == (20, 2, 4)  # medians of epochs 2, 3 and 1


def test_a_miss_is_infinite_and_counts_in_the_median(folder: StudyFolder):
    for metric in ("clean_train_loss", "val_accuracy"):
        row = table(folder)["sgd-b128-none", metric]
        assert (row["n"], row["reached"], row["steps"], row["seconds"]) == (3, 1, inf, inf)
        assert "1 of 3 confirmed runs diverged" in row["note"]
    assert table(folder, loss=0.5)["sgd-b128-none", "clean_train_loss"]["steps"] == 10


def test_times_of_every_run(folder: StudyFolder):
    times = targets.times_to_target(load.confirmed_epochs(folder), Target("clean_train_loss", 0.2))
    large = times[times["cell"] == "sgd-b128-none"].sort_values("repeat")
    assert large["steps"].tolist() == [inf, 20, inf]
    assert large["seconds"].tolist() == [inf, 4, inf]
    assert large["steps_low"].tolist() == [30, 10, 20]  # of misses the last step, of hits the evaluation before
    small = times[times["cell"] == "sgd-b32-none"].sort_values("repeat")
    assert small["steps_low"].tolist() == [10, 20, 0]


def test_runs_that_go_on_do_not_count_and_are_said(folder: StudyFolder):
    row = table(folder)["sgd-b32-mixup", "clean_train_loss"]
    assert (row["n"], row["reached"], row["epochs"]) == (1, 1, 1)
    assert "1 of 2 confirmed runs failed, go on or are damaged" in row["note"]


def test_cells_without_confirmed_runs_are_rows_that_say_so(folder: StudyFolder):
    rows = table(folder)
    assert len(rows) == 16
    assert isnan(rows["kfac-b32-none", "val_accuracy"]["steps"])
    assert rows["kfac-b32-none", "val_accuracy"]["note"] == "no confirmed run has ended"


def test_no_baseline_no_target(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    add_run(folder, "kfac-b32-none", curve(0.3), trial=0)
    row = table(folder)["kfac-b32-none", "clean_train_loss"]
    assert isnan(row["target"])
    assert isnan(row["steps"])
    assert "no target: no confirmed run of sgd-b32-none" in row["note"]
    assert table(folder, loss=0.4)["kfac-b32-none", "clean_train_loss"]["steps"] == 10


def test_validation_samples_that_were_trained_on_are_said(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    add_run(folder, "sgd-b32-none", curve(0.3), trial=0, run={"train_on": "all"})
    assert "were trained on" in table(folder)["sgd-b32-none", "val_accuracy"]["note"]
    assert table(folder)["sgd-b32-none", "clean_train_loss"]["note"] == ""


@pytest.mark.parametrize("given", [{"loss": 0.0}, {"loss": inf}, {"accuracy": 93.0}, {"accuracy": nan}])
def test_impossible_targets(given: dict[str, float], folder: StudyFolder):
    with pytest.raises(StudyError, match="target"):
        table(folder, **given)


def test_nothing_confirmed_renders(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    found = targets.targets_table(STUDY, load.confirmed(folder), load.confirmed_epochs(folder))
    for style in ("csv", "json", "markdown", "latex"):
        assert "no target" in tables.render(found, style)


def test_halfway_targets_are_what_the_worst_run_had_at_half_of_its_epochs(folder: StudyFolder):
    found = targets.halfway_targets(load.confirmed(folder), load.confirmed_epochs(folder), targets.baseline(STUDY))
    assert found == [Target("clean_train_loss", 0.3, "half"), Target("val_accuracy", 0.7, "half")]  # epoch 2 of 3


def test_a_ratio_of_times_knows_the_epoch():
    found = targets.speed_ratio(pd.Series([29.0] * 3), pd.Series([30.0] * 3))
    within = sqrt((1 / 29**2 + 1 / 30**2) / 12) * scipy_stats.t.ppf(0.975, 2) / sqrt(3)
    assert (found.low, found.value, found.high) == pytest.approx((28 / 30 * exp(-within), 29 / 30, exp(within)))
    spread = targets.speed_ratio(pd.Series([290.0, 310, 330]), pd.Series([600.0, 610, 590]))
    exact = scipy_stats.ttest_1samp(np.log([290 / 600, 310 / 610, 330 / 590]), 0).confidence_interval()
    assert (spread.low, spread.high) == pytest.approx(tuple(np.exp(exact)), rel=0.01)  # where an epoch is little
    assert (spread.low, spread.high) != pytest.approx(tuple(np.exp(exact)), rel=0.001)
    first = targets.speed_ratio(pd.Series([1.0] * 3), pd.Series([20.0] * 3))
    assert first.low == 0
    assert first.high < 0.2
    assert isnan(targets.speed_ratio(pd.Series([3.0]), pd.Series([4.0])).low)


@pytest.mark.parametrize("sd", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [3, 5])
def test_equally_fast_cells_are_told_apart_in_one_of_twenty_studies(n: int, sd: float):
    random = np.random.default_rng(0)
    times = np.ceil(random.uniform(10, 11, (600, 1, 1)) + random.normal(0, sd, (600, 2, n)))
    found = [targets.speed_ratio(*map(pd.Series, pair)) for pair in times]
    assert np.mean([ratio.low > 1 or ratio.high < 1 for ratio in found]) < 0.05 + 2 * sqrt(0.05 * 0.95 / 600)


TUNED = study_of(
    ["kfac", "sgd"], [32, 128], ["none"],
    tuning={"trials": 4, "metric": "steps_to_target", "target": {"val_accuracy": 0.7}},
)  # fmt: skip


def watched(*accuracies: float) -> list[dict]:
    """A run of two epochs of ten steps and two seconds, evaluated every four steps and at the ends of epochs."""
    found = {4: 0, 8: 1, 10: 2, 12: 3, 16: 4, 20: 5}
    values = {step: accuracies[place] for step, place in found.items()}
    return [
        {
            "val_accuracy": values[end], "clean_train_loss": 1 - values[end],
            "within": [
                {"step": step, "epochs": step / 10, "seconds": 0.2 * (step - end + 10), "val_accuracy": values[step]}
                for step in steps
            ],
        }
        for end, steps in ((10, (4, 8)), (20, (12, 16)))
    ]  # fmt: skip


@pytest.mark.parametrize(("at", "time"), [
    (0, (4, 0, 0.4, 0, 0.8)), (1, (8, 4, 0.8, 0.4, 1.6)), (2, (10, 8, 1, 0.8, 2)), (3, (12, 10, 1.2, 1, 2.4)),
    (4, (16, 12, 1.6, 1.2, 3.2)), (5, (20, 16, 2, 1.6, 4)), (6, (inf, 20, inf, 2, inf)),
])  # fmt: skip
def test_times_are_known_to_the_evaluations_within_epochs(at: int, time: tuple[float, ...], tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", TUNED, {})
    add_run(folder, "sgd-b32-none", watched(*[0.1] * at, *[0.7] * (6 - at)), 0, trial=0)
    add_run(folder, "kfac-b32-none", curve(0.9, 0.2), 0, trial=0)  # without any
    times = targets.times_to_target(load.confirmed_epochs(folder), Target("val_accuracy", 0.7)).set_index("cell")
    found = times.loc["sgd-b32-none", ["steps", "steps_low", "epochs", "epochs_low", "seconds"]]
    assert found.tolist() == pytest.approx(list(time))
    assert times.loc["kfac-b32-none", ["steps", "steps_low", "epochs_low"]].tolist() == [20, 10, 1]
    # the training loss is measured at the ends of epochs only
    loss = targets.times_to_target(load.confirmed_epochs(folder), Target("clean_train_loss", 0.3 + 1e-9))
    sgd = loss.set_index("cell").loc["sgd-b32-none"]
    ends = (10, 0) if at <= 2 else (20, 10) if at <= 5 else (inf, 20)
    assert (sgd["steps"], sgd["steps_low"]) == ends


def test_a_study_that_was_tuned_for_a_target_has_that_one(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", TUNED, {})
    for repeat, at in enumerate((1, 3, 6)):
        add_run(folder, "sgd-b32-none", watched(*[0.1] * at, *[0.7] * (6 - at)), repeat, trial=0)
    for repeat in range(3):
        add_run(folder, "sgd-b128-none", watched(*[0.5] * 6), repeat, trial=0)  # nobody gets there
        add_run(folder, "kfac-b128-none", watched(*[0.5 + 0.2 * (repeat == 1)] * 6), repeat, trial=0)  # one of three
    confirmed = load.confirmed(folder)
    assert targets.choose_targets(TUNED, confirmed) == [Target("val_accuracy", 0.7, "tuned")]
    assert targets.choose_targets(TUNED, confirmed, accuracy=0.6)[1] == Target("val_accuracy", 0.6)
    table = targets.targets_table(TUNED, confirmed, load.confirmed_epochs(folder))
    found = table.set_index(["optimizer", "batch_size"])[["n", "reached", "steps"]]
    assert found.loc[("sgd", 32)].tolist() == [3, 2, 12]
    assert found.loc[("sgd", 128)].tolist() == [3, 0, inf]
    assert found.loc[("kfac", 128)].tolist() == [3, 1, inf]
    assert found.loc[("kfac", 32), "n"] == 0


def test_a_ratio_is_widened_by_what_is_known():
    a, b = pd.Series([3.0, 3.2, 3.4]), pd.Series([6.0, 6.1, 5.9])
    epochs, exact = targets.speed_ratio(a, b), targets.speed_ratio(a, b, a - 1e-9, b - 1e-9)
    known = targets.speed_ratio(a, b, a - 0.1, b - 0.1)
    assert epochs.low < known.low < exact.low < exact.high < known.high < epochs.high
    interval = np.exp(scipy_stats.ttest_1samp(np.log(a / b), 0).confidence_interval())
    assert (exact.low, exact.high) == pytest.approx(tuple(interval), rel=1e-6)
    assert epochs == targets.speed_ratio(a, b, a - 1, b - 1)


def test_equally_fast_cells_are_told_apart_in_one_of_twenty_studies_where_steps_are_known():
    """Evaluated every tenth of an epoch."""
    random = np.random.default_rng(0)
    times = np.ceil(10 * (random.uniform(10, 11, (600, 1, 1)) + random.normal(0, 0.5, (600, 2, 3)))) / 10
    found = [targets.speed_ratio(*map(pd.Series, pair), *map(pd.Series, pair - 0.1)) for pair in times]
    assert np.mean([ratio.low > 1 or ratio.high < 1 for ratio in found]) < 0.05 + 2 * sqrt(0.05 * 0.95 / 600)
