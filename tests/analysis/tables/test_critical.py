"""The table of critical batch sizes, from constructed runs."""

from collections.abc import Callable
from math import ceil, inf, isnan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.report import sentences
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import critical
from lbstudy.analysis.tables.targets import Target
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import PARAMS, add_run, study_of

SIZES = [32, 128, 512, 2048]
STUDY = study_of(["sgd"], SIZES, ["none"])
GOAL = Target("val_accuracy", 0.7)


def curve(time: float, every: int = 20, until: float = inf) -> list[dict[str, float]]:
    """Evaluated every so many steps until it reaches 0.7, or was trained for long enough."""
    last = int(min(ceil(time / every) * every, until // every * every))
    return [{"step": step, "val_accuracy": 0.7 if step >= time else 0.5} for step in range(every, last + 1, every)]


def folder_of(
    path: Path, study: StudySpec, time: Callable[[int, int], float],
    until: Callable[[int], float] = lambda batch: inf,
    trial_times: Callable[[int], list[float]] = lambda batch: [],
) -> StudyFolder:  # fmt: skip
    """Three confirmed runs of each cell, and trials with these times, the best first: (batch, repeat) -> steps."""
    folder = StudyFolder.create(path, study)
    for cell in study.list_cells():
        batch, factors = cell.batch_size, dict(cell.factors)
        for number, steps in enumerate(trial_times(batch) or [1000.0]):
            last = {"step": 10**6, "val_accuracy": 0.99 - 0.01 * number}
            add_run(folder, cell.name, [*curve(steps), last], number, params=PARAMS, factors=factors)
        for repeat in range(3):
            add_run(folder, cell.name, curve(time(batch, repeat), until=until(batch)), repeat, trial=0, factors=factors)
    return folder


def table(folder: StudyFolder, goals: list[Target] | None = None) -> pd.DataFrame:
    tuned = critical.Tuning(load.trials(folder), load.epochs(folder))
    goals = [GOAL] if goals is None else goals
    return critical.critical_table(folder.study(), load.confirmed(folder), load.confirmed_epochs(folder), tuned, goals)


def steps(batch: int, repeat: int) -> float:
    return 1000 * (1 + 300 / batch) * (0.95, 1.0, 1.05)[repeat]


def test_a_row_says_where_steps_stop_falling(tmp_path: Path):
    row = table(folder_of(tmp_path / "s", STUDY, steps)).iloc[0]
    assert row["b_crit"] == pytest.approx(300, rel=0.02)
    assert row["s_min"] == pytest.approx(1000, rel=0.02)
    assert row["s_min_low"] == pytest.approx(1000 - 4.303 * 50 / np.sqrt(3), rel=0.03)  # t(2), deviation 50
    assert (row["n"], row["runs"], row["reached"], row["note"]) == (3, 12, 12, "")
    said = sentences.critical_sentence(sentences.worded(row.to_dict(), STUDY))
    assert said.startswith(
        "SGD without smoothing: B_crit is 298 [291, 306], where steps are twice the fewest (S_min, 1003)"
    )
    assert said.endswith("(n = 3, 12 of 12 runs got there).")


def test_intervals_over_trials_are_those_of_resampled_trials(tmp_path: Path):
    """The second best trial, at one batch size, is twice as slow: a resample has it with (1/2)^2 of two trials."""

    def trial_times(batch: int) -> list[float]:
        return [steps(batch, 1), steps(batch, 1) * (2 if batch == 2048 else 1)]

    row = table(folder_of(tmp_path / "s", STUDY, steps, trial_times=trial_times)).iloc[0]
    assert row["b_crit_tuned"] == row["b_crit_tuned_high"] == pytest.approx(300, rel=0.02)
    assert row["b_crit_tuned_low"] < 200
    assert row["s_min_tuned"] == row["s_min_tuned_low"] == pytest.approx(1000, rel=0.02)
    loss = table(folder_of(tmp_path / "t", STUDY, steps), [Target("clean_train_loss", 0.3)]).iloc[0]
    assert isnan(loss["b_crit_tuned"])  # trials do not measure it


def test_trials_that_have_not_completed_are_never_the_best():
    drawn = pd.DataFrame(
        [(batch, float(rank), s - 1, s) for batch in SIZES for rank, s in ((0, steps(batch, 1)), (inf, 10.0))],
        columns=["batch_size", "rank", "steps_low", "steps"],
    )
    found, _ = critical.resample_trials(drawn)
    assert found.value == pytest.approx(300, rel=0.01)
    assert found.low > 0


@pytest.mark.parametrize(("reached", "until"), [(0, 1080), (1, 1100), (2, 1160)])
def test_runs_that_miss_count_as_later_than_they_ended(reached: int, until: int, tmp_path: Path):
    """At batch 2048 the three take 1089, 1146 and 1204 steps."""
    folder = folder_of(tmp_path / "s", STUDY, steps, lambda batch: until if batch == 2048 else inf)
    row = table(folder).iloc[0]
    assert row["runs"] - row["reached"] == 3 - reached
    assert f"{3 - reached} of 12 runs never reached it" in row["note"]
    assert row["b_crit"] == pytest.approx(300, rel=0.1)


def test_what_lies_outside_of_the_batch_sizes_is_said(tmp_path: Path):
    folder = folder_of(tmp_path / "s", STUDY, lambda b, r: 1e6 / b * (1, 1.01, 1.02)[r])
    row = table(folder).iloc[0]
    assert row["b_crit_high"] == inf
    assert "above the batch sizes studied (largest 2048)" in row["note"]
    assert "within 20 % of perfect scaling up to the largest batch, 2048" in row["note"]
    said = sentences.critical_sentence(sentences.worded(row.to_dict(), STUDY))
    assert "steps fall up to the largest batch, 2048; B_crit is larger" in said
    assert "within 20 % of perfect scaling throughout [2048, ∞]" in said
    level = table(folder_of(tmp_path / "t", STUDY, lambda b, r: 1000 + 20 * r)).iloc[0]
    assert "below the batch sizes studied (smallest 32)" in level["note"]


def test_what_cannot_be_fitted_is_said(tmp_path: Path):
    missed = table(folder_of(tmp_path / "s", STUDY, steps, lambda batch: 500)).iloc[0]
    assert "no run reached the target" in missed["note"]
    assert "no run reached the target" in sentences.critical_sentence(sentences.worded(missed.to_dict(), STUDY))
    one = study_of(["sgd"], [32], ["none"])
    assert "one batch size has no curve" in table(folder_of(tmp_path / "t", one, steps)).iloc[0]["note"]
    empty = table(StudyFolder.create(tmp_path / "u", STUDY))
    assert empty.iloc[0]["note"] == "no confirmed run has ended"
    for style in ("csv", "json", "markdown", "latex"):
        assert "no confirmed run" in tables.render(empty, style)


def test_each_variant_has_its_own(tmp_path: Path):
    content = STUDY.model_dump(by_alias=True, exclude_none=True)
    content["cells"]["fixed.weight_decay"] = [0, 1e-4]
    study = StudySpec.model_validate(content)
    found = table(folder_of(tmp_path / "s", study, steps))
    assert len(found) == 2
    assert found["b_crit"].round().nunique() == 1
