"""Each verdict on constructed data."""

from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import health
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import PARAMS, add_run, confirmed_study, study_of
from tests.conftest import TINY_STUDY

STUDY = study_of(["sgd", "kfac"], [32, 128], ["none"])
CHECKS = ["budget", "divergence", "edge", "pruning", "convergence", "learning", "over-fitting"]


def counts(**given: int) -> dict[str, int]:
    none = dict.fromkeys(["running", "completed", "pruned", "diverged", "failed"], 0)
    return none | given | {"ended": sum(given.values()) - given.get("running", 0)}


def runs(*series: dict[str, list[float]]) -> pd.DataFrame:
    """Curves of one cell, a run each."""
    return pd.concat(
        [
            pd.DataFrame({"cell": "c", "number": i, "epoch": range(1, 1 + len(next(iter(s.values())))), **s})
            for i, s in enumerate(series)
        ]
    )


def test_budget():
    assert health.budget(STUDY, counts(completed=2, pruned=1, diverged=1)).verdict == "ok"
    short = health.budget(STUDY, counts(completed=2, running=2))
    assert (short.verdict, "2 of 4" in short.sentence) == ("warning", True)


@pytest.mark.parametrize(
    ("trials", "confirmed", "verdict", "words"),
    [
        (counts(completed=3, diverged=1), counts(completed=5), "ok", "1 of 4 trials diverged."),
        (counts(completed=2, diverged=2), counts(), "warning", "narrow the ranges"),
        (counts(diverged=4), counts(), "warning", "there is no result"),
        (counts(completed=4), counts(completed=4, diverged=1), "warning", "1 of 5 confirmed runs"),
        (counts(running=3), counts(), "cannot tell", "No trial has ended"),
    ],
)
def test_divergence(trials, confirmed, verdict: str, words: str):
    found = health.divergence(trials, confirmed)
    assert found.verdict == verdict
    assert words in found.sentence


@pytest.mark.parametrize(
    ("metric", "values", "verdict", "words"),
    [
        (
            "val_accuracy",
            [0.6, 0.64, 0.7],
            "warning",
            "2 of 3 pruned trials, a published one among them, stood higher",
        ),
        ("val_accuracy", [0.5, 0.6, 0.62], "ok", "None of 3 pruned trials"),
        ("val_loss", [0.6, 0.64, 0.7], "warning", "val_loss 0.6 at epoch 2 against 0.62 at epoch 4"),
    ],
)
def test_a_pruned_trial_that_was_ahead(tmp_path: Path, metric: str, values: list[float], verdict: str, words: str):
    study = study_of(["sgd"], [32], ["none"], tuning=TINY_STUDY["tuning"] | {"metric": metric})
    folder = StudyFolder.create(tmp_path / "s", study)
    for number, value in enumerate(values):
        add_run(folder, "sgd-b32-none", [{metric: value}] * 2, number, "pruned", published=number == 1)
    assert pruning(folder).verdict == "cannot tell"
    add_run(folder, "sgd-b32-none", [{metric: 0.62}] * 4, 3)
    found = pruning(folder)
    assert found.verdict == verdict
    assert words in found.sentence


def pruning(folder: StudyFolder) -> health.Finding:
    study, trials = folder.study(), load.trials(folder)
    (cell,) = study.list_cells()
    return health.pruning(study, cell, trials, tables.best_trials(study, trials).set_index("cell"))


def test_convergence_of_a_line_and_of_a_plateau():
    steps = np.arange(20)
    rising, flat = list(0.5 + 0.01 * steps), [0.9] * 20
    found = health.convergence(runs({"val_accuracy": rising}), "val_accuracy")
    assert found.verdict == "warning"
    assert "0.02 better" in found.sentence  # two epochs against the two before
    assert health.convergence(runs({"val_accuracy": flat}), "val_accuracy").verdict == "ok"
    assert health.convergence(runs({"val_loss": rising}), "val_loss").verdict == "ok"  # a rising loss is no gain
    assert health.convergence(runs({"val_loss": rising[::-1]}), "val_loss").verdict == "warning"
    assert health.convergence(runs({"val_accuracy": [0.1, 0.2] * 4}), "val_accuracy").verdict == "cannot tell"


def noise(random: np.random.Generator, studies: int, runs_each: int, epochs: int, memory: float) -> np.ndarray:
    """Stationary noise of deviation 1, each value `memory` times the one before plus something new."""
    shocks = random.normal(size=(studies, runs_each, epochs)) * sqrt(1 - memory**2)
    values = [random.normal(size=(studies, runs_each))]
    for epoch in range(1, epochs):
        values.append(memory * values[-1] + shocks[..., epoch])
    return np.stack(values, axis=-1)


@pytest.mark.parametrize("memory", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("epochs", [10, 15, 30, 150])
def test_noise_is_no_improvement_however_long_it_lasts(epochs: int, memory: float):
    random = np.random.default_rng(0)
    for runs_each in (1, 3, 5):
        found = [health.final_gain(list(study)) for study in noise(random, 600, runs_each, epochs, memory)]
        alarms = np.mean([gain > 2 * error for gain, error in found])
        assert alarms < 0.05 + 2 * sqrt(0.05 * 0.95 / 600), runs_each


def test_more_runs_see_smaller_improvements():
    random = np.random.default_rng(1)

    def share(runs_each: int, per_window: float) -> float:
        studies = noise(random, 1000, runs_each, 30, 0.0) + per_window / 3 * np.arange(30)
        return float(np.mean([gain > 2 * error for gain, error in map(health.final_gain, map(list, studies))]))

    assert [share(runs_each, 1) for runs_each in (1, 3, 5)] == pytest.approx([0.28, 0.56, 0.76], abs=0.06)
    assert [share(runs_each, 2) for runs_each in (1, 3, 5)] == pytest.approx([0.69, 0.98, 1], abs=0.06)


def test_over_fitting():
    down, up = list(np.linspace(1, 0.1, 20)), [*np.linspace(1, 0.4, 10), *np.linspace(0.4, 0.8, 10)]
    found = health.over_fitting(runs({"val_loss": up, "train_loss": down}))
    assert found.verdict == "warning"
    assert "94 % above" in found.sentence  # means of two epochs: 0.778 over 0.4
    assert health.over_fitting(runs({"val_loss": down, "train_loss": down})).verdict == "ok"
    assert health.over_fitting(runs({"val_loss": up, "train_loss": up})).verdict == "ok"  # training got worse as well
    most = [{"val_loss": curve, "train_loss": down} for curve in (up, down, down)]
    assert health.over_fitting(runs(*most)).verdict == "ok"
    assert health.over_fitting(runs({"val_loss": [np.nan] * 9, "train_loss": down[:9]})).verdict == "cannot tell"


def special(path: Path, study: StudySpec, sgd: list[float], kfac: list[float]) -> health.Finding:
    folder = confirmed_study(path / "s", study, {"sgd-b128-none": sgd, "kfac-b128-none": kfac})
    best = tables.best_trials(study, load.trials(folder)).set_index("cell")
    return health.special_case(study, study.list_cells()[3], best, load.confirmed(folder))


@pytest.mark.parametrize(
    ("sgd", "kfac", "verdict", "words"),
    [
        ([0.9, 0.91, 0.89], [0.8, 0.82, 0.79], "warning", "-9.67 points of test accuracy"),
        ([0.9, 0.91, 0.89], [0.95, 0.85, 0.9], "ok", "n = 3"),
        ([0.9, 0.9, 0.9], [0.8, 0.8, 0.8], "cannot tell", "-10.00 points of test accuracy with each of 3 seeds"),
        ([0.9], [0.1], "cannot tell", "0.9 against 0.9 of SGD; two confirmed seeds would tell"),
    ],
)
def test_kfac_against_sgd(sgd, kfac, verdict: str, words: str, tmp_path: Path):
    found = special(tmp_path, STUDY, sgd, kfac)
    assert found.verdict == verdict
    assert words in found.sentence


HOLDS_SGD = {"damping": {"log_uniform": [1e-2, 1e5], "when": {"optimizer": "kfac"}}}  # SGD's best rate is 0.1


@pytest.mark.parametrize(
    ("fixed", "search", "model", "why"),
    [
        ({}, HOLDS_SGD, "lenet5", None),
        ({"weight_decay": 1e-4, "kfac": {"weight_decay": "preconditioned"}}, HOLDS_SGD, "vgg9", None),
        ({"damping": 1e4}, {}, "lenet5", None),
        ({"kl_clip": 1e-2}, HOLDS_SGD, "lenet5", "kl_clip shortens its steps."),
        ({"weight_decay": 1e-4}, HOLDS_SGD, "lenet5", "weight decay is not preconditioned."),
        ({"kfac": {"batch_norm": "plain"}}, HOLDS_SGD, "vgg9", "batch norm is not preconditioned."),
        ({}, {}, "lenet5", "its ranges lack damping 1e+04."),
        (
            {},
            HOLDS_SGD
            | {"learning_rate": [{"uniform": [1e-3, 9], "when": {"optimizer": "kfac"}}, {"uniform": [1e-3, 1]}]},
            "lenet5",
            "its ranges lack learning_rate 1e+03.",
        ),
        (
            {},
            HOLDS_SGD | {"momentum": {"uniform": [0.8, 0.95], "when": {"optimizer": "sgd"}}},
            "lenet5",
            "its ranges lack momentum 0.85.",
        ),
    ],
)
def test_kfac_that_loses_is_under_tuned_only_where_it_could_have_been_sgd(
    fixed, search, model: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    search = {key: [entry] if isinstance(entry, dict) else entry for key, entry in search.items()}
    monkeypatch.setattr("tests.confirmed_runs.PARAMS", {"learning_rate": 0.1, "momentum": 0.85})
    study = study_of(
        ["sgd", "kfac"], [32, 128], ["none"], fixed=fixed, model=model,
        search={"learning_rate": [{"log_uniform": [1e-3, 1e6]}]} | search,
    )  # fmt: skip
    found = special(tmp_path, study, [0.9, 0.91, 0.89], [0.8, 0.82, 0.79])
    assert found.verdict == "warning"
    assert (f"for {why}" if why else "a sign of too little tuning.") in found.sentence


@pytest.mark.parametrize(
    ("ends", "classes", "verdict", "sentence"),
    [
        ([0.9, 0.15], 10, "ok", "All 2 runs have learnt: 0.15 and more; guessing has 0.1."),
        ([0.9, 0.14], 10, "warning", "1 of 2 runs of the best configuration have hardly learnt: a validation accuracy of "
                                     "0.14, where guessing has 0.1."),
        ([0.52, 0.6], 2, "warning", "1 of 2 runs of the best configuration have hardly learnt: a validation accuracy of "
                                    "0.52, where guessing has 0.5."),
        ([0.9], None, "cannot tell", "The number of classes is not known."),
        ([], 10, "cannot tell", "No run has ended."),
    ],
)  # fmt: skip
def test_a_run_that_ends_at_guessing_is_named(ends: list[float], classes: int | None, verdict: str, sentence: str):
    rows = [("a", number, epoch, end if epoch == 3 else 0.5) for number, end in enumerate(ends) for epoch in (1, 2, 3)]
    curves = pd.DataFrame(rows, columns=["cell", "number", "epoch", "val_accuracy"])
    assert health.learning(curves, classes) == health.Finding(verdict, sentence)  # type: ignore[arg-type]


def test_how_many_classes_there_are_is_known_where_all_data_agree(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    assert folder.of_data("classes") is None
    folder.keep_data({"a": {"classes": 10}})
    assert folder.of_data("classes") == 10
    folder.keep_data({"b": {"classes": 100}})
    assert folder.of_data("classes") is None


@pytest.mark.parametrize(
    ("adds", "verdict", "words"),
    [
        ([(0.02, 0.01, 0.03)], "ok", "literature's: +2.00 points of test accuracy [1.00, 3.00], n = 3."),
        ([(0.02, -0.01, 0.05)], "ok", "[-1.00, 5.00]"),
        (
            [(0.02, 0.01, 0.03), (-0.04, -0.06, -0.01)],
            "warning",
            "-4.00 points of test accuracy [-6.00, -1.00], n = 3. Tuning, or its pruner, has chosen the worse",
        ),
        ([(-0.04, float("nan"), float("nan"))], "cannot tell", "one seed has no interval"),
    ],
)
def test_tuning_against_the_literature(adds: list[tuple[float, float, float]], verdict: str, words: str):
    columns = ["tuning_adds", "tuning_adds_low", "tuning_adds_high"]
    found = health.against_published(pd.DataFrame(adds, columns=columns).assign(n=3))
    assert found.verdict == verdict
    assert words in found.sentence


def test_table_of_a_study(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {"sgd-b32-none": [0.9, 0.91]})
    falling = [{"val_loss": 1 - 0.05 * i, "val_accuracy": 0.05 * i, "clean_train_loss": 1.0} for i in range(12)]
    add_run(folder, "sgd-b32-none", falling, number=2, trial=0)
    add_run(folder, "sgd-b128-none", [{"val_accuracy": 0.95}], number=1, params={"learning_rate": 9e5})
    folder.keep_data({"digits": {"classes": 10}})
    table = health.health_table(folder)
    assert len(table) == 4 * 7 + 2
    found = {(row.cell, row.check): row for row in table.itertuples()}
    assert found["sgd-b32-none", "convergence"].verdict == "warning"
    assert "n = 1" in found["sgd-b32-none", "convergence"].sentence  # the other two have one epoch
    assert "learning_rate 9e+05 (the high end of [0.001, 1e+06] log)" in found["sgd-b128-none", "edge"].sentence
    assert found["kfac-b32-none", "edge"].verdict == "ok"
    assert found["kfac-b32-none", "learning"].verdict == "ok"
    assert table["sentence"].str.endswith(".").all()
    add_run(folder, "sgd-b128-none", [{"val_accuracy": 0.9}], number=2, params={"learning_rate": 1.0})
    folder.keep_data({"digits": {"classes": 10, "training images": 50}})  # ten validate: 0.9 is as good as 0.95
    found = {(row.cell, row.check): row for row in health.health_table(folder).itertuples()}
    level = found["sgd-b128-none", "edge"]
    assert level.verdict == "ok"
    assert "but a trial in the middle half is as good" in level.sentence
    assert "learning_rate 9e+05 (the high end" in level.sentence


def health_of(
    path: Path, kfac: list[float], sgd: list[float], **changes: object
) -> dict[tuple[str, str], health.Finding]:
    """Of a study that was tuned for steps, where confirmed runs of 30 epochs get there after so many of them."""
    study = study_of(
        ["sgd", "kfac"], [128], ["none"],
        **{"tuning": {"trials": 1, "metric": "steps_to_target", "target": {"val_accuracy": 0.8}}} | changes,
    )  # fmt: skip
    folder = confirmed_study(path / "s", study, {})
    for cell, times in {"kfac-b128-none": kfac, "sgd-b128-none": sgd}.items():
        hit = {"steps_to_target": 40} if any(at <= 30 for at in times) else {}
        add_run(folder, cell, [{"val_accuracy": 0.75, "val_loss": 0.3, "nearest": 0.75, **hit}], params=PARAMS)
        for repeat, at in enumerate(times):
            add_run(folder, cell, [{"val_accuracy": 0.9 if e >= at else 0.5} for e in range(1, 31)], repeat, trial=0)
    table = health.health_table(folder)
    assert "convergence" not in set(table["check"])
    return {(row.cell, row.check): health.Finding(row.verdict, row.sentence) for row in table.itertuples()}


def test_a_study_for_a_target_is_asked_whether_it_gets_there(tmp_path: Path):
    found = health_of(tmp_path, [3, 4, 5], [99] * 3)
    assert found["kfac-b128-none", "target"] == health.Finding(
        "ok", "The best trial has reached validation accuracy 0.8 after 40 steps, and all 3 confirmed runs have."
    )
    missed = found["sgd-b128-none", "target"]
    assert missed.verdict == "warning"
    assert "No trial has reached validation accuracy 0.8: the best one came to 0.75" in missed.sentence
    assert found["kfac-b128-none", "against SGD"].verdict == "cannot tell"


def test_confirmed_runs_that_miss_are_a_warning(tmp_path: Path):
    found = health_of(tmp_path, [3, 99, 99], [3, 4, 5])["kfac-b128-none", "target"]
    assert found.verdict == "warning"
    assert "but of 3 confirmed runs 1 have within the budget" in found.sentence


@pytest.mark.parametrize(("kfac", "sgd", "verdict", "words"), [
    ([10, 11, 12], [20, 22, 25], "ok", "0.49 times SGD's steps to the target"),
    ([20, 22, 24], [10, 11, 12], "warning", "K-FAC is behind SGD: 2 times SGD's steps"),
    ([20], [10], "cannot tell", "Two confirmed seeds of both"),
])  # fmt: skip
def test_kfac_loses_where_it_needs_more_steps(kfac, sgd, verdict: str, words: str, tmp_path: Path):
    found = health_of(tmp_path, kfac, sgd)["kfac-b128-none", "against SGD"]
    assert found.verdict == verdict
    assert words in found.sentence


def test_kfac_is_not_sgd_in_seconds(tmp_path: Path):
    tuning = {"trials": 1, "metric": "seconds_to_target", "target": {"val_accuracy": 0.8}}
    found = health_of(tmp_path, [20, 22, 24], [10, 11, 12], tuning=tuning)["kfac-b128-none", "against SGD"]
    assert "in seconds it may lose" in found.sentence


def test_curves_are_those_of_the_best_trial_where_nothing_is_confirmed(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {})
    better = [{"val_accuracy": 0.9 + 0.01 * i, "val_loss": 0.1, "train_loss": 0.5} for i in range(3)]
    add_run(folder, "sgd-b32-none", better, number=5)
    for repeat in range(2):  # these trained on the validation samples: no use
        add_run(folder, "sgd-b32-none", [{"val_accuracy": 1.0}], number=repeat, trial=5, run={"train_on": "all"})
    add_run(folder, "sgd-b128-none", [{"val_accuracy": 0.7, "clean_train_loss": 0.3}], trial=0)
    best = tables.best_trials(STUDY, load.trials(folder)).set_index("cell")
    curves = health.best_curves(folder, best, load.confirmed(folder)).set_index("cell")
    assert curves.loc["sgd-b32-none", "val_accuracy"].tolist() == pytest.approx([0.9, 0.91, 0.92])
    assert curves.loc["sgd-b32-none", "train_loss"].tolist() == [0.5] * 3
    assert curves.loc[["sgd-b128-none"], "train_loss"].tolist() == [0.3]


def missing(folder: StudyFolder) -> str:
    study = folder.study()
    found = health.list_missing(study, load.trials(folder), load.confirmed(folder))
    return " ".join([*found, *health.list_absent(study)])


def test_nothing_is_missing(tmp_path: Path):
    study = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"], tuning={"trials": 1})
    folder = confirmed_study(tmp_path / "s", study, {cell.name: [0.9, 0.91] for cell in study.list_cells()})
    assert missing(folder) == ""


def test_what_is_missing_is_said(tmp_path: Path):
    study = study_of(["sgd"], [32], ["mixup"])
    folder = confirmed_study(tmp_path / "one", study, {})
    assert "1 of 4 trials have ended" in missing(folder)
    assert "Nothing has been confirmed" in missing(folder)
    assert "One batch size" in missing(folder)
    assert "No cell without smoothing" in missing(folder)
    assert "No K-FAC" in missing(folder)
    folder = confirmed_study(tmp_path / "few", STUDY, {"sgd-b32-none": [0.9], "sgd-b128-none": [np.nan]})
    add_run(folder, "sgd-b32-none", [{}], number=1, status="running", trial=0)
    assert "One seed a cell" in missing(folder)
    assert "best configuration: sgd-b128-none, kfac-b32-none, kfac-b128-none." in missing(folder)
    assert "sgd-b128-none: of its confirmed runs 1 diverged." in missing(folder)
    assert "sgd-b32-none: of its confirmed runs 1 not ended." in missing(folder)
    assert "No smoothing" in missing(folder)


def test_published_configurations_with_fewer_runs_are_missing(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", STUDY, {cell.name: [0.9, 0.91] for cell in STUDY.list_cells()})
    for cell in ("sgd-b32-none", "sgd-b128-none"):
        add_run(folder, cell, [{"val_accuracy": 0.1}], 1, "pruned", published=True)
    assert "published configuration" not in missing(folder)  # nobody asked for them
    add_run(folder, "sgd-b128-none", [{"test_accuracy": 0.9}], 5, trial=1, repeat=0, published=True)
    said = missing(folder)
    assert "kfac" not in said
    assert "A published configuration of sgd-b32-none has 0 of 2 confirmed runs; `lbstudy confirm --published`" in said
    assert "A published configuration of sgd-b128-none has 1 of 2 confirmed runs" in said


def test_a_published_configuration_among_the_best_of_each_cell_was_not_asked_for(tmp_path: Path):
    """As `confirm --top 2` leaves them."""
    folder = confirmed_study(tmp_path / "s", STUDY, {cell.name: [0.9, 0.91] for cell in STUDY.list_cells()})
    for cell in STUDY.list_cells():
        add_run(folder, cell.name, [{"val_accuracy": 0.8}], 1, published=cell.name == "sgd-b32-none")
        add_run(folder, cell.name, [{"val_accuracy": 0.1}], 2, "pruned", published=True)
        for repeat in (0, 1):
            run = {"trial": 1, "repeat": repeat, "published": cell.name == "sgd-b32-none"}
            add_run(folder, cell.name, [{"test_accuracy": 0.9}], 2 + repeat, **run)
    assert "published configuration" not in missing(folder)


def test_a_cell_whose_trials_all_diverged(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    for number in range(4):
        add_run(folder, "sgd-b32-none", [{"val_loss": np.nan}], number=number, status="diverged")
    assert "sgd-b32-none has no result: of 4 trials none completed, 0 were pruned and 4 diverged." in missing(folder)
    table = health.health_table(folder).set_index("check")
    assert table["verdict"].to_dict() == dict(zip(CHECKS, ["ok", "warning", *["cannot tell"] * 5], strict=True))


def test_an_empty_study_renders(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", STUDY)
    for style in ("csv", "json", "markdown", "latex"):
        assert "No trial has ended" in tables.render(health.health_table(folder), style)
    assert "0 of 16 trials have ended" in missing(folder)
