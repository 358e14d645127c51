"""Verdicts on constructed numbers, held against SciPy's tests."""

from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy import stats as scipy_stats

from benchmarks import claims as simulated
from lbstudy.analysis import load
from lbstudy.analysis.report import claims, questions, sentences
from lbstudy.analysis.report.claims.accuracy import WHEN_STOPPED
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import gaps, targets
from lbstudy.study.spec import Cell, StudySpec
from tests.confirmed_runs import add_run, confirmed_frame, confirmed_study, study_of

BOTH = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"])
SGD = study_of(["sgd"], [32, 128, 512], ["none", "mixup"])


@pytest.mark.parametrize(
    ("low", "high", "above", "verdict"),
    [
        (0.51, 0.9, "supported", "supported"),
        (0.51, 0.9, "contradicted", "contradicted"),
        (0.1, 0.49, "supported", "contradicted"),
        (0.1, 0.49, "contradicted", "supported"),
        (0.4, 0.6, "supported", "cannot tell"),
        (0.5, 0.9, "supported", "cannot tell"),  # the interval holds the threshold
        (0.1, 0.5, "supported", "cannot tell"),
        (nan, nan, "supported", "cannot tell"),
    ],
)
def test_an_interval_decides_only_on_one_side(low: float, high: float, above, verdict: str):
    assert claims.decide(low, high, 0.5, above) == verdict


def test_a_claim_needs_all_its_comparisons():
    def claim(*verdicts: claims.Verdict) -> claims.Claim:
        return claims.Claim("n", "c", "r", [claims.Comparison(v, "s") for v in verdicts], "e", "gap")

    assert claim("supported", "supported").verdict == "supported"
    assert claim("contradicted").verdict == "contradicted"
    assert claim("supported", "cannot tell").verdict == "cannot tell"
    assert claim("supported", "contradicted").verdict == "cannot tell"
    assert claim().verdict == "cannot tell"


def falling(at: int, length: int = 30) -> list[dict[str, float]]:
    """A curve whose loss is low and whose accuracy is high from this epoch on."""
    return [
        {"clean_train_loss": 0.1, "val_accuracy": 0.9} if epoch >= at else {"clean_train_loss": 1, "val_accuracy": 0.5}
        for epoch in range(1, length + 1)
    ]


def steps_claim(
    path: Path, kfac: list[int], sgd: list[int], halfway: bool = False, **run: object
) -> claims.Claim:  # fmt: skip
    """The first claim where runs have reached the target after so many epochs."""
    folder = confirmed_study(path, BOTH, {})
    for cell, epochs in {"kfac-b128-none": kfac, "sgd-b128-none": sgd}.items():
        for repeat, at in enumerate(epochs):
            add_run(folder, cell, falling(at), repeat, trial=0, run=run)
    confirmed, series = load.confirmed(folder), load.confirmed_epochs(folder)
    pair = claims.rivals(BOTH)
    assert pair is not None
    assert [cell.name for cell in pair] == ["kfac-b128-none", "sgd-b128-none"]
    goals = targets.choose_targets(BOTH, confirmed, cell=pair[1])
    goals += targets.halfway_targets(confirmed, series, pair[1]) if halfway else []
    return claims.fewer_steps(BOTH, confirmed, {g: targets.winners_times(confirmed, series, g) for g in goals})


@pytest.mark.parametrize(
    ("kfac", "sgd", "verdict"),
    [
        ([2, 3, 2], [6, 7, 6], "supported"),
        ([6, 7, 6], [2, 3, 2], "contradicted"),
        ([2, 8, 2], [6, 7, 6], "cannot tell"),
        ([29] * 3, [30] * 3, "cannot tell"),  # within the resolution: the ratio may be 1
        ([28] * 3, [30] * 3, "supported"),  # beyond it
        ([20] * 3, [30] * 3, "supported"),
        ([1] * 3, [2] * 3, "cannot tell"),
        ([2], [6], "cannot tell"),  # one seed
        ([99] * 5, [6] * 5, "contradicted"),  # Fisher: p = 0.008
        ([99] * 3, [6] * 3, "cannot tell"),  # Fisher: p = 0.1
        ([2, 2, 2, 2, 99], [6] * 5, "cannot tell"),
    ],
)
def test_steps(kfac: list[int], sgd: list[int], verdict: str, tmp_path: Path):
    claim = steps_claim(tmp_path, kfac, sgd)
    assert claim.verdict == verdict
    assert len(claim.comparisons) == 2  # training loss and validation accuracy
    sentence = claim.comparisons[0].sentence
    if 99 in kfac:
        reached = sum(at != 99 for at in kfac)
        p = scipy_stats.fisher_exact([[reached, len(kfac) - reached], [len(sgd), 0]]).pvalue
        assert f"{reached} of {len(kfac)} K-FAC runs" in sentence
        assert f"p = {p:.2g}" in sentence
        assert ("cannot bring it below 0.1, and four of each could" in sentence) == (len(kfac) == 3)
    else:
        ratio = np.exp(np.mean(np.log(np.array(kfac) / np.array(sgd))))
        assert f"K-FAC reached training loss 0.1, where SGD ended, in {ratio:.2g} times" in sentence
        assert ("no interval" in sentence) == (len(kfac) == 1)


def test_smoothing_that_cuts_a_loss_which_is_a_gain_at_the_best_epochs_is_not_judged(tmp_path: Path):
    folder = confirmed_study(tmp_path, SGD, {})
    mixed = [0.895, 0.908, 0.915, 0.9, 0.906]
    ends = {"sgd-b32-none": (SMALL, SMALL), "sgd-b512-none": (None, PLAIN), "sgd-b32-mixup": (SMALL, SMALL),
            "sgd-b512-mixup": (mixed, mixed)}  # fmt: skip
    for turned in (False, True):
        for cell, (best, last) in ends.items():
            for repeat in range(5):
                stopped = best[repeat] if best else PLAIN[repeat] + (0.2 if turned else 0)
                curve = [{"val_accuracy": v, "test_accuracy": a} for v, a in ((0.9, stopped), (0.8, last[repeat]))]
                add_run(folder, cell, curve, 5 * turned + repeat, trial=0, repeat=repeat + 5 * turned)
        confirmed = load.confirmed(folder)
        confirmed = confirmed[confirmed["repeat"] >= 5 * turned]
        claim = claims.more_than_halves(SGD, confirmed, gaps.gap_table(SGD, confirmed))
        assert claim.verdict == ("cannot tell" if turned else "supported")
        assert (claim.comparisons[0].need == WHEN_STOPPED) == turned


def test_what_fewer_steps_are_worth_is_read_at_the_best_epoch_too(tmp_path: Path):
    folder = confirmed_study(tmp_path, BOTH, {})
    ends = {
        "kfac-b128-none": ([0.93, 0.95, 0.94], [0.80, 0.81, 0.83]),
        "sgd-b128-none": ([0.91, 0.9, 0.92], [0.91, 0.9, 0.92]),
    }
    for cell, (best, last) in ends.items():
        for repeat in range(3):
            curve = [{"val_accuracy": 0.9, "clean_train_loss": 0.2, "test_accuracy": best[repeat]},
                     {"val_accuracy": 0.8, "clean_train_loss": 0.1, "test_accuracy": last[repeat]}]  # fmt: skip
            add_run(folder, cell, curve, repeat, trial=0)
    confirmed, series = load.confirmed(folder), load.confirmed_epochs(folder)
    goals = claims.goals(BOTH, confirmed, series)
    claim = claims.fewer_steps(BOTH, confirmed, {g: targets.winners_times(confirmed, series, g) for g in goals})
    assert "K-FAC’s test accuracy less SGD’s is −9.67 points [−" in claim.comparisons[-1].sentence
    assert claim.comparisons[-1].sentence.endswith("; read where validation was best, it is 3.00 [−1.30, 7.30].")


SOON = study_of(
    ["sgd", "kfac"], [32, 128], ["none"], evaluate_every=2,
    tuning={"trials": 4, "metric": "steps_to_target", "target": {"val_accuracy": 0.8}},
)  # fmt: skip


def tuned_claim(path: Path, study: StudySpec, kfac: list[float], sgd: list[float], **run: object) -> claims.Claim:
    """The first claim of such a study, where runs of 30 epochs reach the target after so many tenths of them."""
    folder = confirmed_study(path, study, {})
    for cell, times in {"kfac-b128-none": kfac, "sgd-b128-none": sgd}.items():
        for repeat, at in enumerate(times):
            series = [
                {
                    "clean_train_loss": 0.1, "val_accuracy": 0.9 if epoch >= at else 0.5, "within": [
                        {"step": round(10 * part), "epochs": part, "seconds": 1.0, "val_accuracy": 0.9 if part >= at else 0.5}
                        for part in (epoch - 1 + np.arange(0.2, 1, 0.2)).round(1).tolist()
                    ],
                }
                for epoch in range(1, 31)
            ]  # fmt: skip
            add_run(folder, cell, series, repeat, trial=0, run=run)
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    goals = claims.goals(study, confirmed, epochs)
    return claims.fewer_steps(study, confirmed, {g: targets.winners_times(confirmed, epochs, g) for g in goals})


@pytest.mark.parametrize(
    ("kfac", "sgd", "verdict"),
    [
        ([2, 2.2, 2], [6, 7, 6], "supported"),
        ([6, 7, 6], [2, 2.2, 2], "contradicted"),
        ([28.2] * 3, [29.2] * 3, "supported"),  # within an epoch's resolution, and beyond that of two steps
        ([29] * 3, [29.2] * 3, "cannot tell"),
        ([99] * 5, [6] * 5, "contradicted"),
        ([99] * 3, [6] * 3, "cannot tell"),
        ([2, 99, 2, 2], [99] * 4, "cannot tell"),  # Fisher: p = 0.14
        ([2] * 4, [99] * 4, "supported"),
        ([99] * 3, [99] * 3, "cannot tell"),
        ([2] * 3, [], "cannot tell"),
    ],
)
def test_a_study_tuned_for_steps_is_decided_by_its_target(
    kfac: list[float], sgd: list[float], verdict: str, tmp_path: Path
):
    claim = tuned_claim(tmp_path, SOON, kfac, sgd)
    assert claim.verdict == verdict
    (comparison,) = claim.comparisons
    assert "tuned to reach soon (validation accuracy 0.8)" in claim.rule
    assert "times are known to 2 steps" in claim.rule
    assert claim.table == "targets"
    assert "neither was tuned" not in claim.elsewhere
    if sgd and 99 not in [*kfac, *sgd]:
        ratio = np.exp(np.mean(np.log(np.array(kfac) / np.array(sgd))))
        assert f"K-FAC reached validation accuracy 0.8, which both were tuned for, in {ratio:.2g} times" in (
            comparison.sentence
        )


def test_a_study_tuned_for_seconds_keeps_the_rule_for_steps(tmp_path: Path):
    study = SOON.model_copy(update={"tuning": SOON.tuning.model_copy(update={"metric": "seconds_to_target"})})
    claim = tuned_claim(tmp_path, study, [2, 2, 2], [6, 6, 6])
    assert len(claim.comparisons) == 4
    assert "halfway" in claim.rule


def test_a_target_on_samples_that_were_trained_on_decides_nothing(tmp_path: Path):
    claim = tuned_claim(tmp_path, SOON, [2, 2, 2], [6, 6, 6], train_on="all")
    assert claim.verdict == "cannot tell"
    assert "trained on the validation samples" in claim.comparisons[0].sentence


def test_where_sgd_ends_does_not_decide_alone(tmp_path: Path):
    """SGD's worst run is halfway at loss 1: everyone is there in the first epoch, whoever ends sooner or lower."""
    claim = steps_claim(tmp_path, [2, 3, 2], [26, 27, 26], halfway=True)
    assert [c.verdict for c in claim.comparisons if c.verdict] == ["supported"] * 2 + ["cannot tell"] * 2
    assert claim.verdict == "cannot tell"
    assert "training loss 1, where SGD was halfway, in 1 times [0, inf] SGD’s steps" in claim.comparisons[2].sentence


def test_validation_accuracy_is_no_target_where_it_was_trained_on(tmp_path: Path):
    claim = steps_claim(tmp_path, [2, 3, 2], [6, 7, 6], train_on="all")
    assert [c.sentence.count("training loss") for c in claim.comparisons] == [1]


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (SGD, "no K-FAC"),
        (study_of(["kfac"], [32, 128], ["none"]), "no SGD"),
        (study_of(["lars"], [32, 128], ["none"]), "no K-FAC and SGD"),
        (study_of(["sgd", "kfac"], [32, 128], ["none"], exclude=[{"optimizer": "kfac", "batch_size": 128},
                                                                  {"optimizer": "sgd", "batch_size": 32}]), "share no"),
        (BOTH, "No confirmed run of sgd-b128-none has completed"),
    ],
)  # fmt: skip
def test_steps_without_the_cells(study: StudySpec, words: str, tmp_path: Path):
    claim = claims.fewer_steps(study, confirmed_frame(tmp_path, study, {}), {})
    assert claim.verdict == "cannot tell"
    assert words in claim.comparisons[0].sentence


SMALL = [0.90, 0.91, 0.92, 0.90, 0.91]


def gap_claims(path: Path, study: StudySpec, accuracies: dict[str, list[float]]) -> tuple[claims.Claim, claims.Claim]:
    confirmed = confirmed_frame(path, study, accuracies)
    table = gaps.gap_table(study, confirmed)
    return claims.generalises_worse(study, confirmed, table), claims.more_than_halves(study, confirmed, table)


@pytest.mark.parametrize(
    ("large", "verdict"),
    [
        ([0.80, 0.82, 0.83, 0.81, 0.82], "supported"),
        ([0.95, 0.96, 0.96, 0.95, 0.97], "contradicted"),
        ([0.90, 0.92, 0.91, 0.91, 0.90], "cannot tell"),
        ([0.80], "cannot tell"),
        ([0.80, 0.82, 0.83, 0.81, nan], "cannot tell"),  # one diverged: the others are a choice
        ([a - 0.1 for a in SMALL], "cannot tell"),  # equal differences, whose spread is not known
    ],
)
def test_generalisation_is_judged_at_the_largest_batch(large: list[float], verdict: str, tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b128-none": SMALL, "sgd-b512-none": large}
    claim, _ = gap_claims(tmp_path, SGD, runs)
    assert claim.verdict == verdict
    assert len(claim.comparisons) == 1
    sentence = claim.comparisons[0].sentence
    assert "From batch 32 to 512, SGD without smoothing" in sentence
    assert ("at each of 5 seeds, which have no interval" in sentence) == (large == [a - 0.1 for a in SMALL])
    if len(large) == 5 and nan not in large and "at each" not in sentence:
        test = scipy_stats.ttest_1samp(np.subtract(SMALL, large) * 100, 0)
        sign = 1 if test.statistic >= 0 else -1
        ends = sorted(sign * end for end in test.confidence_interval())
        words = f"{'lost' if sign > 0 else 'gained'} {abs(np.mean(np.subtract(SMALL, large))) * 100:.2f} points"
        assert words in sentence
        assert f"[{ends[0]:.2f}, {ends[1]:.2f}] (n = 5)".replace("-", "−") in sentence
    assert ("diverged" in sentence) == (nan in large)


def test_configurations_tuned_for_steps_decide_nothing_about_accuracy(tmp_path: Path):
    large = [0.80, 0.82, 0.83, 0.81, 0.82]
    runs = {"sgd-b32-none": SMALL, "sgd-b128-none": large, "kfac-b32-none": SMALL, "kfac-b128-none": large}
    assert gap_claims(tmp_path / "accuracy", BOTH, runs)[0].verdict == "supported"
    claim, _ = gap_claims(tmp_path / "steps", SOON, runs)
    assert claim.verdict == "cannot tell"
    for comparison in claim.comparisons:
        assert "lost 9.20 points" in comparison.sentence
        assert comparison.sentence.endswith("tuned to reach a target soon, not for accuracy.")


PLAIN = [0.80, 0.812, 0.818, 0.801, 0.809]  # a gap of 0.10, give or take 0.002


@pytest.mark.parametrize(
    ("small", "large", "verdict"),
    [
        (SMALL, [0.87, 0.885, 0.89, 0.87, 0.885], "supported"),
        (SMALL, [0.82, 0.825, 0.84, 0.82, 0.825], "contradicted"),
        (SMALL, [0.85, 0.86, 0.875, 0.845, 0.86], "cannot tell"),
        ([a - 0.09 for a in SMALL], [0.82, 0.825, 0.84, 0.82, 0.825], "cannot tell"),  # narrowed, but not closed
        (SMALL, [0.87], "cannot tell"),
    ],
)
def test_smoothing_halves_the_gap_in_both_senses(small, large, verdict: str, tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN, "sgd-b32-mixup": small, "sgd-b512-mixup": large}
    assert gap_claims(tmp_path, SGD, runs)[1].verdict == verdict


def test_a_diverged_run_decides_nothing(tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN, "sgd-b32-mixup": SMALL}
    _, claim = gap_claims(tmp_path, SGD, {**runs, "sgd-b512-mixup": [0.87, 0.885, 0.89, 0.87, nan]})
    assert claim.verdict == "cannot tell"
    assert "confirmed runs failed: 1 of sgd-b512-mixup diverged" in claim.comparisons[0].sentence


@pytest.mark.parametrize(
    ("at_best", "verdict", "said"),
    [
        (SMALL, "contradicted", ""),
        ([a - 0.2 for a in SMALL], "cannot tell", "; read where its validation was best, it lost 10.00 ["),
        ([0.9, 0.7, 0.9, 0.72, 0.85], "contradicted", "], which cannot be told from nothing."),
    ],
    ids=["the same", "the opposite", "nothing"],
)
def test_a_gap_that_turns_where_training_is_stopped_decides_nothing(
    tmp_path: Path, at_best: list[float], verdict: str, said: str
):
    """At the end the large batch gains ten points."""
    folder = confirmed_study(tmp_path, SGD, {})
    for repeat, (small, large, best) in enumerate(zip(PLAIN, SMALL, at_best, strict=True)):
        for name, accuracies in (("sgd-b32-none", [small, small]), ("sgd-b512-none", [best, large])):
            curve = [{"val_accuracy": v, "test_accuracy": a} for v, a in zip([0.9, 0.8], accuracies, strict=True)]
            add_run(folder, name, curve, repeat, trial=0)
    confirmed = load.confirmed(folder)
    (comparison,) = claims.generalises_worse(SGD, confirmed, gaps.gap_table(SGD, confirmed)).comparisons
    assert comparison.verdict == verdict
    assert said in comparison.sentence
    assert ("read where its validation was best" in comparison.sentence) == bool(said)
    assert (comparison.need == WHEN_STOPPED) == (verdict == "cannot tell")


@pytest.mark.parametrize(("ahead", "said"), [(0.03, True), (0.001, False)])
def test_a_published_configuration_that_did_better_stands_beside_the_claim(tmp_path: Path, ahead: float, said: bool):
    folder = confirmed_study(tmp_path, SGD, {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN})
    for repeat, accuracy in enumerate(PLAIN):
        other = accuracy + ahead + 0.002 * (repeat - 2)
        add_run(
            folder, "sgd-b512-none", [{"test_accuracy": other}], 10 + repeat, trial=1, repeat=repeat, published=True
        )
    confirmed = load.confirmed(folder)
    first, *others = claims.generalises_worse(SGD, confirmed, gaps.gap_table(SGD, confirmed)).comparisons
    interval = scipy_stats.ttest_1samp(100 * (ahead + 0.002 * np.arange(-2, 3)), 0).confidence_interval()
    reached = (
        f"reached 3.00 points [{interval.low:.2f}, {interval.high:.2f}] more test accuracy after the last epoch (n = 5)"
    )
    assert [reached in other.sentence for other in others] == [True] * said
    assert (first.verdict, {other.verdict for other in others}) == ("supported", {None} if said else set())
    assert "sgd-b512-none" in "".join(other.sentence for other in others) or not said


def test_a_run_that_hardly_learnt_decides_nothing(tmp_path: Path):
    large = [0.10, 0.812, 0.818, 0.801, 0.809]
    confirmed = confirmed_frame(tmp_path, SGD, {"sgd-b32-none": SMALL, "sgd-b512-none": large})
    table = gaps.gap_table(SGD, confirmed)
    (comparison,) = claims.generalises_worse(SGD, confirmed, table.assign(gap_low=0.01)).comparisons  # were it to tell
    assert comparison.verdict == "cannot tell"
    assert "1 of sgd-b512-none hardly learnt" in comparison.sentence
    assert "1 of 5 confirmed runs of sgd-b512-none hardly learnt (0.1 to 0.818)" in " ".join(table["note"])


def test_a_share_counts_its_own_seeds_where_a_smoothed_cell_has_none(tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN, "sgd-b512-mixup": [0.87, 0.885, 0.89, 0.87, 0.885]}
    folder = confirmed_study(tmp_path, SGD, runs)
    table = gaps.gap_table(SGD, load.confirmed(folder))
    row = table[(table["smoothing"] == "mixup") & (table["large_batch"] == 512)].iloc[0].to_dict()
    assert (row["n"], row["closed_n"], row["narrowed_n"]) == (0, 5, None)
    row = sentences.worded(row, SGD)
    assert "of SGD’s large-batch gap (n = 5)." in sentences.closed_sentence([row])
    assert "(n = 5); sgd-b32-mixup has no completed confirmed run" in sentences.share_sentence(row)
    assert "narrowed SGD’s large-batch gap by" in sentences.share_sentence(
        row | {"closed": nan, "narrowed": 0.5, "narrowed_low": 0.4, "narrowed_high": 0.6, "narrowed_n": 4}
    )


def test_the_answer_leads_with_the_gap_and_what_closes_it(tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN, "sgd-b32-mixup": SMALL,
            "sgd-b512-mixup": [0.86, 0.875, 0.88, 0.86, 0.875]}  # fmt: skip
    folder = confirmed_study(tmp_path, SGD, runs)
    table = gaps.gap_table(SGD, load.confirmed(folder))
    first, last = questions.lead(SGD, table, tables.best_configs(folder))
    closed = scipy_stats.ttest_1samp(np.subtract(runs["sgd-b512-mixup"], PLAIN) / 0.10 * 100, 0).confidence_interval()
    assert first[1] == "gap"
    assert first[0].startswith("From batch 32 to 512, SGD without smoothing lost 10.00 points of test accuracy")
    assert f"Mixup closed 62 % [{closed.low:.0f}, {closed.high:.0f}] of SGD’s large-batch gap (n = 5)." in first[0]
    assert last[1] == "best"
    assert "validation accuracy 90.00 % in one trial, test accuracy 81" not in last[0]  # of the cell that was chosen:
    assert "without smoothing under SGD" in last[0]
    centre, margin = special.logit(0.808), scipy_stats.sem(PLAIN) * scipy_stats.t.ppf(0.975, 4) / (0.808 * 0.192)
    low, high = 100 * special.expit([centre - margin, centre + margin])
    assert f"test accuracy 80.80 % [{low:.2f}, {high:.2f}] when confirmed (n = 5)" in last[0]


def test_a_gap_that_smoothing_widens_is_not_called_closed(tmp_path: Path):
    runs = {"sgd-b32-none": SMALL, "sgd-b512-none": PLAIN, "sgd-b32-mixup": SMALL,
            "sgd-b512-mixup": [a - 0.05 for a in PLAIN]}  # fmt: skip
    folder = confirmed_study(tmp_path, SGD, runs)
    table = gaps.gap_table(SGD, load.confirmed(folder))
    (sentence, _), *_ = questions.lead(SGD, table, tables.best_configs(folder))
    assert "Mixup closed none of SGD’s large-batch gap: −50 % [" in sentence


def minima(eigenvalues: dict[str, list[float]], widths: dict[str, list[float]], beyond: float = 0, hardly_learnt: tuple[int, ...] = (),
) -> pd.DataFrame:  # fmt: skip
    """`minima_table.runs` of SGD at batch 512, a value per seed and smoothing."""
    return pd.DataFrame([
        {"cell": f"sgd-b512-{s}", "optimizer": "sgd", "batch_size": 512, "smoothing": s, "repeat": repeat,
         "test_accuracy": 0.1 if repeat in hardly_learnt else 0.9,
         "eigenvalue_1": eigenvalues[s][repeat] if s in eigenvalues else nan,
         "width_1": widths[s][repeat] if s in widths else nan, "beyond": beyond}
        for s in ("none", "mixup") for repeat in range(len((eigenvalues or widths)[s]))
    ])  # fmt: skip


SHARP, FLAT = {"none": [20, 22, 24], "mixup": [10, 11, 11]}, {"none": [10, 11, 11], "mixup": [20, 22, 24]}
WIDE, NARROW = {"none": [0.5, 0.6, 0.5], "mixup": [1, 1.1, 1]}, {"none": [1, 1.1, 1], "mixup": [0.5, 0.6, 0.5]}


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        (minima(SHARP, WIDE), "supported"),
        (minima(SHARP, {}), "supported"),
        (minima({}, WIDE), "supported"),
        (minima(FLAT, NARROW), "contradicted"),
        (minima(SHARP, NARROW), "cannot tell"),
        (minima(SHARP, WIDE, beyond=0.6), "cannot tell"),
        (minima(SHARP, WIDE, hardly_learnt=(1,)), "cannot tell"),
        (minima({"none": [20], "mixup": [10]}, {}), "cannot tell"),
        (minima({"none": [20, 22, 24], "mixup": [10, 50, 11]}, {}), "cannot tell"),
        (minima({"none": [20, 22, -1], "mixup": [10, 11, 11]}, {}), "cannot tell"),
    ],
)
def test_minima(runs: pd.DataFrame, verdict: str):
    claim = claims.wider_minima(SGD, runs)
    assert claim.verdict == verdict
    assert "SGD at batch 512 with Mixup" in claim.comparisons[0].sentence
    assert "Large positive eigenvalues mean a sharp minimum" in claim.elsewhere


def test_a_valley_wider_than_its_line_is_said():
    (comparison,) = claims.wider_minima(SGD, minima(SHARP, WIDE, beyond=0.6)).comparisons
    assert "at +1 not known, since some valley goes on beyond the line" in comparison.sentence


def test_no_minimum_measured():
    claim = claims.wider_minima(SGD, minima(SHARP, WIDE).iloc[:0])
    assert (claim.verdict, claim.comparisons[0].sentence) == ("cannot tell", "No minimum has been measured.")


def test_numbers_in_words():
    assert sentences.points(-0.01234) == "−1.23"
    assert sentences.points(-0.00001) == "0.00"
    assert sentences.percent(0.5) == "50.00"
    assert sentences.count(1) == "one seed: no interval"


@pytest.mark.parametrize("case", simulated.CASES, ids=lambda case: f"{case.claim}: {case.truth}")
def test_few_verdicts_are_wrong(case: simulated.Case):
    """A small version of benchmarks/claims.py, whose table is in docs/analysis.md."""
    studies = 15
    found = simulated.verdicts(case, 5, studies)
    wrong = max(share for verdict, share in found.items() if verdict not in case.allowed)
    assert wrong * studies <= scipy_stats.binom.isf(1e-3, studies, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", simulated.SEEDS)
@pytest.mark.parametrize("case", simulated.CASES, ids=lambda case: f"{case.claim}: {case.truth}")
def test_at_most_one_verdict_in_twenty_is_wrong(case: simulated.Case, seeds: int):
    studies = 500
    found = simulated.verdicts(case, seeds, studies)
    wrong = max(share for verdict, share in found.items() if verdict not in case.allowed)
    assert wrong * studies <= scipy_stats.binom.isf(1e-3, studies, 0.05)


def test_simulated_times_are_those_of_the_records(tmp_path: Path):
    """The simulation finds the epochs to a target by itself, since many frames take long."""
    random = np.random.default_rng(0)
    losses = {Cell(o, 128, "none"): np.sort(random.random((3, 30)))[:, ::-1] for o in ("sgd", "kfac")}
    folder = confirmed_study(tmp_path, BOTH, {})
    for cell, curves in losses.items():
        for repeat, curve in enumerate(curves):
            metrics = [{"clean_train_loss": loss, "val_accuracy": 1 - loss} for loss in curve]
            add_run(folder, cell.name, metrics, repeat, trial=0)
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    sgd = Cell("sgd", 128, "none")
    end, half = targets.choose_targets(BOTH, confirmed, cell=sgd), targets.halfway_targets(confirmed, epochs, sgd)
    found = simulated.times_to_sgd(
        simulated.runs_frame(BOTH, {cell: curves[:, -1] for cell, curves in losses.items()}, "clean_train_loss"),
        losses[sgd], losses,
    )  # fmt: skip
    assert list(found) == [end[0], half[0]]
    for goal, frame in found.items():
        real = targets.winners_times(confirmed, epochs, goal).set_index(["cell", "repeat"])["epochs"]
        assert real.sort_index().equals(frame.set_index(["cell", "repeat"])["epochs"].sort_index())
