"""The gap table on constructed studies."""

from math import isnan, nan, sqrt
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lbstudy.analysis import load, stats
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import gaps
from tests.confirmed_runs import add_run, confirmed_frame, confirmed_study, study_of

STUDY = study_of(["sgd", "kfac"], [32, 128, 512], ["none", "mixup"])
SMALL = [0.90, 0.91, 0.89]


def minus(values: list[float], *differences: float) -> list[float]:
    return [value - difference for value, difference in zip(values, differences, strict=True)]


def rows(path: Path, accuracies: dict[str, list[float]]) -> dict[tuple[str, str, int], dict]:
    table = gaps.gap_table(STUDY, confirmed_frame(path / "s", STUDY, accuracies))
    assert len(table) == 8
    return {(row["optimizer"], row["smoothing"], row["large_batch"]): row for row in table.to_dict("records")}


@pytest.fixture
def closing(tmp_path: Path) -> dict[tuple[str, str, int], dict]:
    """SGD loses 10 points at 128, and Mixup wins 7.5 of them back but costs the small batch 1."""
    return rows(
        tmp_path,
        {
            "sgd-b32-none": SMALL,
            "sgd-b128-none": minus(SMALL, 0.10, 0.11, 0.09),
            "sgd-b32-mixup": minus(SMALL, 0.01, 0.01, 0.01),
            "sgd-b128-mixup": minus(SMALL, 0.025, 0.0285, 0.0215),
        },
    )


def test_gap_with_its_paired_interval(closing):
    row = closing["sgd", "none", 128]
    interval = scipy_stats.ttest_1samp([0.10, 0.11, 0.09], 0).confidence_interval(0.95)
    assert (row["small_batch"], row["n"]) == (32, 3)
    assert row["gap"] == pytest.approx(0.10)
    assert (row["gap_low"], row["gap_high"]) == pytest.approx(tuple(interval))
    assert row["small_accuracy"] - row["large_accuracy"] == pytest.approx(row["gap"])
    assert 0.01 / 3**0.5 * 5 < row["resolvable"] < 0.01 / 3**0.5 * 6  # t(2) asks for 5.65 standard errors
    assert isnan(row["closed"])
    assert row["note"] == ""


def test_gap_where_each_run_is_read_at_its_best_epoch(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    curves = {"sgd-b32-none": [0.92, 0.80], "sgd-b128-none": [0.70, 0.85]}  # the small batch over-fits
    for name, accuracies in curves.items():
        for repeat, off in enumerate([0, 0.01, 0.03]):
            curve = [
                {"val_accuracy": a, "test_accuracy": a - (off if name == "sgd-b32-none" else 0)} for a in accuracies
            ]
            add_run(folder, name, curve, repeat, trial=0)
    row = gaps.gap_table(STUDY, load.confirmed(folder)).query("optimizer == 'sgd'").iloc[0]
    interval = scipy_stats.ttest_1samp([0.07, 0.06, 0.04], 0).confidence_interval(0.95)
    found = [row[f"gap_at_best_epoch{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx([0.17 / 3, *interval])
    assert row["gap"] == pytest.approx(-0.05 - 0.04 / 3)


def test_share_closed_and_narrowed(closing):
    row = closing["sgd", "mixup", 128]
    assert row["gap"] == pytest.approx(0.015)
    assert row["gap_to_none"] == pytest.approx(0.025)
    assert row["closed"] == pytest.approx(0.75)
    assert 0.7 < row["closed_low"] < 0.75 < row["closed_high"] < 0.8
    assert row["narrowed"] == pytest.approx(0.85)
    assert row["narrowed_low"] < 0.85 < row["narrowed_high"]
    assert (row["closed_n"], row["narrowed_n"]) == (3, 3)
    assert row["note"] == ""


def test_what_was_not_confirmed_is_said(closing):
    assert closing["sgd", "none", 512]["note"] == "sgd-b512-none has no completed confirmed run"
    row = closing["kfac", "mixup", 128]
    assert (row["n"], isnan(row["gap"]), isnan(row["closed"])) == (0, True, True)
    assert "no share of a gap without kfac-b32-none and kfac-b128-none" in row["note"]


NO_SHARE = {
    "indistinct": ([0.02, -0.02, 0.01], "cannot be told from zero"),
    "reversed": ([-0.02, -0.021, -0.019], "the large batch does better"),
}


@pytest.mark.parametrize("case", NO_SHARE)
def test_no_share_of_no_gap(case: str, tmp_path: Path):
    lost, reason = NO_SHARE[case]
    found = rows(
        tmp_path,
        {
            "sgd-b32-none": SMALL, "sgd-b32-mixup": SMALL,
            "sgd-b128-none": minus(SMALL, *lost), "sgd-b128-mixup": SMALL,
        },
    )["sgd", "mixup", 128]  # fmt: skip
    assert isnan(found["closed"])
    assert isnan(found["narrowed"])
    assert reason in found["note"]


def test_one_seed_has_a_gap_and_claims_no_share(tmp_path: Path):
    cells = {"sgd-b32-none": [0.9], "sgd-b128-none": [0.8], "sgd-b32-mixup": [0.9], "sgd-b128-mixup": [0.85]}
    found = rows(tmp_path, cells)
    row = found["sgd", "mixup", 128]
    assert (row["gap"], row["n"]) == (pytest.approx(0.05), 1)
    assert all(isnan(row[name]) for name in ("gap_low", "gap_high", "resolvable", "closed", "narrowed"))
    assert "one seed" in row["note"]


def test_diverged_runs_are_counted_and_pairs_kept(tmp_path: Path):
    found = rows(
        tmp_path,
        {
            "sgd-b32-none": [*SMALL, 0.5], "sgd-b128-none": [nan, *minus([*SMALL[1:], 0.5], 0.11, 0.09, 0.1)],
            "sgd-b32-mixup": [*SMALL, 0.5], "sgd-b128-mixup": [*minus(SMALL, 0.05, 0.056, 0.044), nan],
            "kfac-b32-none": SMALL, "kfac-b128-none": [nan, nan, nan],
        },
    )  # fmt: skip
    row = found["sgd", "none", 128]
    assert (row["n"], row["gap"]) == (3, pytest.approx(0.10))
    assert "1 of 4 confirmed runs of sgd-b128-none diverged and are not in the means" in row["note"]
    mixup = found["sgd", "mixup", 128]
    assert (mixup["n"], mixup["gap"]) == (3, pytest.approx(0.05))
    assert (
        "`closed` is not given: the 2 repeats common to its cells" in mixup["note"]
    )  # 0.11 and 0.09, with t(1) = 12.7
    lost = found["kfac", "none", 128]
    assert (lost["n"], lost["small_accuracy"], isnan(lost["large_accuracy"])) == (0, pytest.approx(0.9), True)
    assert "3 of 3 confirmed runs of kfac-b128-none diverged" in lost["note"]


PARTIAL = {
    "one cell": (["sgd"], [32], ["none"], {"sgd-b32-none": SMALL}, []),
    "nothing confirmed": (["sgd"], [32, 128], ["none", "mixup"], {}, ["no completed confirmed run"] * 2),
    "no smoothing": (["sgd"], [32, 128], ["none"], {"sgd-b32-none": SMALL}, ["sgd-b128-none has no completed"]),
    "only smoothed": (
        ["sgd"], [32, 128], ["mixup"], {"sgd-b32-mixup": SMALL, "sgd-b128-mixup": SMALL},
        ["no share of a gap without sgd-b32-none and sgd-b128-none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTIAL)
def test_partial_studies_render_and_say_what_is_missing(case: str, tmp_path: Path):
    *lists, accuracies, notes = PARTIAL[case]
    study = study_of(*lists)
    table = gaps.gap_table(study, confirmed_frame(tmp_path / "s", study, accuracies))
    assert len(table) == len(notes)
    assert all(expected in note for expected, note in zip(notes, table["note"], strict=True))
    for style in ("csv", "json", "markdown", "latex"):
        assert tables.render(table, style)


def test_an_excluded_small_cell_is_said(tmp_path: Path):
    study = study_of(["sgd"], [32, 128], ["none", "mixup"], exclude=[{"batch_size": 32, "smoothing": "mixup"}])
    table = gaps.gap_table(study, confirmed_frame(tmp_path / "s", study, {})).set_index("smoothing")
    assert "sgd-b32-mixup is no cell of the study" in table["note"]["mixup"]


def test_a_share_that_is_the_same_at_every_repeat_has_no_interval(tmp_path: Path):
    lost = [0.10, 0.11, 0.09]
    cells = {"sgd-b32-none": SMALL, "sgd-b128-none": minus(SMALL, *lost), "sgd-b32-mixup": SMALL,
             "sgd-b128-mixup": minus(SMALL, *(0.25 * loss for loss in lost))}  # fmt: skip
    row = rows(tmp_path, cells)["sgd", "mixup", 128]
    assert isnan(row["closed"])
    assert "`closed` is not given: it is 0.75 at every repeat, so that its spread is not known" in row["note"]


def test_equal_differences_have_no_interval(tmp_path: Path):
    cells = {"sgd-b32-none": SMALL, "sgd-b128-none": minus(SMALL, 1 / 360, 1 / 360, 1 / 360)}
    row = rows(tmp_path, cells)["sgd", "none", 128]
    assert row["gap"] == pytest.approx(1 / 360)
    assert all(isnan(row[name]) for name in ("gap_low", "gap_high", "resolvable"))
    assert row["note"] == "the gap is the same at every repeat: no interval"


def test_a_weak_gap_is_said_beside_its_shares(tmp_path: Path):
    def note(*lost: float) -> str:
        cells = {"sgd-b32-none": SMALL, "sgd-b32-mixup": SMALL, "sgd-b128-none": minus(SMALL, *lost),
                 "sgd-b128-mixup": minus(SMALL, 0.01, 0.012, 0.011)}  # fmt: skip
        return rows(tmp_path / str(lost), cells)["sgd", "mixup", 128]["note"]

    assert "weak gap: less than 2 times its margin" in note(0.09, 0.12, 0.15)  # margin 0.075
    assert "weak gap" not in note(0.10, 0.11, 0.12)  # margin 0.025


@pytest.mark.parametrize(("errors", "given"), [(1.5, 0.2), (2, 0.15), (3, 0.06), (4, 0.02), (6, 0)])
def test_shares_of_weak_gaps_are_drawn_towards_one_half(errors: float, given: float):
    """The median of the shares that are given, where the gap is so many of its standard errors; docs/analysis.md."""
    for truth, median in ((0, given), (1, 1 - given)):
        found, shares = shares_of_gaps(errors, truth, n=5)
        assert np.median(shares[found.low > 0]) == pytest.approx(median, abs=0.02)


@pytest.mark.parametrize(("n", "escaped"), [(3, 0.04), (5, 0.03), (10, 0.02)])
def test_few_weak_gaps_escape_the_note(n: int, escaped: float):
    """Where the gap is 1.5 of its standard errors; docs/analysis.md."""
    found, _ = shares_of_gaps(1.5, 0, n)
    strong = [not gaps.is_weak(stats.Mean((low + high) / 2, 1, n, low, high)) for low, high in zip(*found, strict=True)]
    assert np.mean(strong & (found.low > 0)) == pytest.approx(escaped, abs=0.01)


def shares_of_gaps(errors: float, truth: float, n: int):
    """Of made-up studies with n seeds: the intervals of their gaps, and the shares that smoothing has closed."""
    random, studies = np.random.default_rng(0), 40_000
    gap = errors * sqrt(2 / n)
    small, plain, smoothed = (random.normal(mean, 1, (studies, n)) for mean in (0, -gap, (truth - 1) * gap))
    found = scipy_stats.ttest_1samp(small - plain, 0, axis=1).confidence_interval()
    return found, 1 - (small - smoothed).mean(axis=1) / (small - plain).mean(axis=1)
