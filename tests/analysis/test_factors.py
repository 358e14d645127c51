"""A study of model x weight decay x optimizer x batch size x smoothing: what its tables, claims and figures compare.

Its accuracies are made so that a pair of cells that differ in more than they should gives another number.
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from lbstudy.analysis import load
from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.minima.compute import LandscapeSettings, landscape_tasks
from lbstudy.analysis.report import claims, conditions
from lbstudy.analysis.report.questions import Question, lead
from lbstudy.analysis.tables import best, gaps, health, targets
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.console.cli import app
from lbstudy.console.terminal import fit_columns
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.tuning.confirm import plan_runs
from tests.confirmed_runs import PARAMS, add_run, study_of

MODELS, DECAYS, SEEDS, EPOCHS = ["lenet5", "vgg9"], [0, 5e-4], 3, 12
NO_IMAGES = {"name": "cifar10", "root": "/nowhere", "validation_size": 0.2}
NOISE = np.random.default_rng(0).normal(0, 2e-3, size=(SEEDS, 64))


def make_study(**changes: object) -> StudySpec:
    study = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"], dataset=NO_IMAGES)
    content = study.model_dump(by_alias=True, exclude_none=True) | changes
    content["cells"] = {**content["cells"], "model": MODELS, "fixed.weight_decay": DECAYS}
    return StudySpec.model_validate(content)


STUDY = make_study()


def accuracy(cell: Cell, repeat: int) -> float:
    """Of VGG9 higher; the gap is 0.10, twice that without weight decay, and half with K-FAC; Mixup closes 60 % of it."""
    factors = dict(cell.factors)
    gap = 0.10 * (2 if factors["fixed.weight_decay"] == 0 else 1) * (0.5 if cell.optimizer == "kfac" else 1)
    lost = gap * (0.4 if cell.smoothing == "mixup" else 1) if cell.batch_size == 128 else 0
    place = STUDY.list_cells().index(cell)
    return (0.9 if factors["model"] == "vgg9" else 0.7) - lost + NOISE[repeat, place]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    folder = StudyFolder.create(tmp_path_factory.mktemp("factors") / "s", STUDY)
    for cell in STUDY.list_cells():
        key = {"factors": dict(cell.factors), "params": PARAMS}
        for number in range(STUDY.tuning.trials):
            value = accuracy(cell, 0) - 0.02 * number
            add_run(
                folder, cell.name, [{"val_accuracy": value, "val_loss": 1 - value, "train_loss": 0.4}], number, **key
            )
        for repeat in range(SEEDS):
            speed, end = (4 if cell.optimizer == "kfac" else 1), accuracy(cell, repeat)
            curve = [
                {"test_accuracy": end, "val_accuracy": end - 0.3 / (speed * epoch), "val_loss": 0.5,
                 "clean_train_loss": 1 / (speed * epoch), "clean_train_accuracy": end, "train_loss": 1 / epoch}
                for epoch in range(1, EPOCHS + 1)
            ]  # fmt: skip
            add_run(folder, cell.name, curve, repeat, trial=0, run={"train_on": "split"}, device="cpu", **key)
    return folder


@pytest.fixture(scope="module")
def confirmed(folder: StudyFolder) -> pd.DataFrame:
    return load.confirmed(folder)


def test_records_come_back_with_a_column_for_each_factor(confirmed: pd.DataFrame):
    assert list(confirmed)[:7] == [
        "cell",
        "optimizer",
        "batch_size",
        "smoothing",
        "model",
        "fixed.weight_decay",
        "number",
    ]
    row = confirmed[confirmed["cell"] == "kfac-b32-none-vgg9-weight_decay=0.0005"].iloc[0]
    assert (row["model"], row["fixed.weight_decay"]) == ("vgg9", 5e-4)


def test_gaps_are_those_of_cells_that_share_all_other_factors(confirmed: pd.DataFrame):
    """Each row against the accuracies it should be of, with scipy's t interval."""
    table = gaps.gap_table(STUDY, confirmed)
    assert list(table)[:5] == ["optimizer", "smoothing", "model", "fixed.weight_decay", "small_batch"]
    assert len(table) == 2 * 2 * 2 * 2
    for row in table.to_dict("records"):
        factors = (("model", row["model"]), ("fixed.weight_decay", row["fixed.weight_decay"]))

        def runs(batch_size: int, smoothing: str, row=row, factors=factors) -> np.ndarray:
            cell = Cell(row["optimizer"], batch_size, smoothing, factors)
            return np.array([accuracy(cell, repeat) for repeat in range(SEEDS)])

        own = runs(32, row["smoothing"]) - runs(128, row["smoothing"])
        interval = scipy_stats.ttest_1samp(own, 0).confidence_interval(0.95)
        assert row["gap"] == pytest.approx(own.mean(), abs=1e-12)
        assert (row["gap_low"], row["gap_high"]) == pytest.approx(tuple(interval), abs=1e-12)
        if row["smoothing"] == "mixup":
            plain = runs(32, "none") - runs(128, "none")
            left = runs(32, "none") - runs(128, "mixup")
            assert row["closed"] == pytest.approx(1 - left.mean() / plain.mean(), abs=1e-12)
            assert row["narrowed"] == pytest.approx(1 - own.mean() / plain.mean(), abs=1e-12)
    plain = table[table["smoothing"] == "none"].set_index(["model", "fixed.weight_decay", "optimizer"])["gap"]
    assert plain["lenet5", 0, "sgd"] == pytest.approx(0.2, abs=0.01)
    assert plain["vgg9", 5e-4, "kfac"] == pytest.approx(0.05, abs=0.01)


def test_best_has_a_column_for_each_factor_with_a_short_name_for_readers(folder: StudyFolder):
    configs = best.best_configs(folder)
    assert list(configs)[:5] == ["optimizer", "batch_size", "smoothing", "model", "fixed.weight_decay"]
    assert "weight_decay" not in configs
    shown = best.for_terminal(configs)
    assert list(shown)[:5] == ["optimizer", "batch_size", "smoothing", "model", "weight_decay"]
    assert set(shown["weight_decay"]) == {"0", "0.0005"}
    assert best.budget_sentence(STUDY, configs) == "Every cell has had the same budget: 4 trials."


def test_unequal_budgets_are_seen_in_every_cell(folder: StudyFolder):
    more = STUDY.model_copy(update={"tuning": STUDY.tuning.model_copy(update={"trials": 5})})
    sentence = best.budget_sentence(more, best.best_configs(folder))
    assert sentence.count(": 4") == len(STUDY.list_cells())
    assert "sgd-b32-none-lenet5-weight_decay=0: 4" in sentence


def test_each_variant_has_targets_of_its_own(folder: StudyFolder, confirmed: pd.DataFrame):
    epochs = load.confirmed_epochs(folder)
    table = targets.targets_table(STUDY, confirmed, epochs)
    goals = (
        table[table["metric"] == "val_accuracy"].groupby(["model", "fixed.weight_decay"])["target"].agg(["min", "max"])
    )
    for (model, decay), row in goals.iterrows():  # type: ignore[misc]
        cell = Cell("sgd", 32, "none", (("model", model), ("fixed.weight_decay", decay)))
        worst = min(accuracy(cell, repeat) for repeat in range(SEEDS)) - 0.3 / EPOCHS
        assert (row["min"], row["max"]) == pytest.approx((worst, worst))
    assert [targets.baseline(part).name for part in STUDY.variants()] == [
        f"sgd-b32-none-{model}-weight_decay={decay:g}" for model in MODELS for decay in DECAYS
    ]


def test_kfac_is_compared_with_sgd_of_the_same_model_and_decay(folder: StudyFolder):
    table = health.health_table(folder)
    found = table[table["check"] == "against SGD"].set_index("cell")["sentence"]
    assert list(table)[:3] == ["cell", "model", "fixed.weight_decay"]
    for cell in (cell for cell in STUDY.list_cells() if cell.optimizer == "kfac"):
        lead = np.mean([accuracy(cell, r) - accuracy(cell.but(optimizer="sgd"), r) for r in range(SEEDS)])
        assert f"{100 * lead:+.2f} points of test accuracy" in found[cell.name]


def test_interpolation_goes_between_cells_that_share_all_other_factors(folder: StudyFolder):
    runs = folder.confirmation.trials()
    tasks = landscape_tasks(folder, "interpolate", runs, LandscapeSettings())
    ends = {(a.cell, b.cell) for task in tasks for (a, _), (b, _) in [task.states]}
    large = [cell for cell in STUDY.list_cells() if cell.batch_size == 128]
    assert ends == {(cell.but(batch_size=32).name, cell.name) for cell in large}


NO_MINIMA = dict.fromkeys([*minima_table.MEASURES, "beyond"], np.nan)


def test_claims_are_of_every_variant_and_say_which(confirmed: pd.DataFrame):
    table = gaps.gap_table(STUDY, confirmed)
    judged = [
        (part, claims.generalises_worse(part, confirmed, load.of_variant(table, part))) for part in STUDY.variants()
    ]
    claim = claims.together(judged)
    assert len([c for c in claim.comparisons if c.verdict]) == 2 * 2 * 2
    assert claim.verdict == "supported"
    assert claim.comparisons[0].of == ("lenet5 and weight decay 0",)
    assert claim.comparisons[0].sentence.startswith("From batch 32 to 128, SGD without smoothing lost 19.91 points")
    wrong = judged[0][1]._replace(comparisons=[claims.Comparison("contradicted", "no")])
    assert claims.together([(STUDY.variants()[0], wrong), *judged[1:]]).verdict == "cannot tell"


def test_what_all_variants_say_in_the_same_words_stands_once(confirmed: pd.DataFrame):
    table = gaps.gap_table(STUDY, confirmed)
    parts = STUDY.variants()
    none = claims.together([(part, claims.fewer_steps(part, confirmed, {})) for part in parts])
    assert len({comparison.sentence for comparison in none.comparisons}) == 4  # each names a cell of its own
    same = claims.together(
        [(part, claims.wider_minima(part, confirmed.iloc[:0].assign(**NO_MINIMA))) for part in parts]
    )
    assert [(c.sentence, c.of) for c in same.comparisons] == [("No minimum has been measured.", ())]
    judged = [(part, claims.generalises_worse(part, confirmed, load.of_variant(table, part))) for part in parts]
    other = judged[0][1]._replace(comparisons=[claims.Comparison("cannot tell", "no")])
    question = Question.of(claims.together([(parts[0], other), (parts[1], other), *judged[2:]]))
    assert [group.of for group in question.groups] == [
        ("lenet5 and weight decay 0", "lenet5 and weight decay 0.0005"), ("vgg9 and weight decay 0",),
        ("vgg9 and weight decay 0.0005",),
    ]  # fmt: skip
    assert question.tally == "cannot tell in 2, supported in 2 of 4 combinations"
    assert Question.of(claims.together(judged)).tally == ""


def test_the_first_sentences_span_the_variants(folder: StudyFolder, confirmed: pd.DataFrame):
    (sgd, _), (kfac, _), (chosen, where) = lead(STUDY, gaps.gap_table(STUDY, confirmed), best.best_configs(folder))
    lost = [
        100 * np.mean([accuracy(Cell("sgd", 32, "none", f), r) - accuracy(Cell("sgd", 128, "none", f), r)
                       for r in range(SEEDS)])
        for f in {cell.factors for cell in STUDY.list_cells()}
    ]  # fmt: skip
    assert sgd == (
        f"From batch 32 to 128, SGD without smoothing lost {min(lost):.2f} to {max(lost):.2f} points of test accuracy in "
        "4 combinations of model and weight decay."
    )
    assert kfac.startswith("From batch 32 to 128, K-FAC without smoothing lost")
    assert "(vgg9 and weight decay 0.0005)" in chosen
    assert where == "best"


def test_correlations_are_within_a_variant():
    cells = [cell.values for cell in STUDY.list_cells()]
    table = pd.DataFrame(cells).assign(test_accuracy=np.arange(32.0) % 8, trace=[*range(16), *reversed(range(16))], n=1)
    found = minima_table.correlations(table)
    assert found["correlation"].tolist() == pytest.approx([1, 1, -1, -1])
    assert found["n"].tolist() == [8] * 4
    assert found["fixed.weight_decay"].tolist() == [0, 5e-4] * 2


def test_what_was_fixed_names_what_varied(confirmed: pd.DataFrame):
    fixed = conditions.describe_fixed(STUDY, confirmed, {}, {})
    assert fixed["factors"] == "model: lenet5, vgg9; fixed.weight_decay: 0, 0.0005"
    assert fixed["model"] == "lenet5, fp32, batch norm: sync; or: vgg9, fp32, batch norm: sync"
    assert "weight decay" not in fixed["hyper-parameters"]


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure instead of all, which take half a minute."""
    name, every = "best_learning_rates", figures.figures_of
    monkeypatch.setattr(figures, "figures_of", lambda *arguments: {name: every(*arguments)[name]})
    monkeypatch.setattr(figures, "figures_of_all", lambda *arguments: {})


def test_each_figure_is_drawn_once_for_each_variant_with_its_cells_only(folder: StudyFolder, one_figure: None):
    drawn = list(figures.draw_all(folder))
    ends = [f"-{model}-weight_decay={decay:g}" for model in MODELS for decay in DECAYS]
    assert [drawing.name for drawing in drawn] == [f"best_learning_rates{end}" for end in ends]
    assert drawn[3].description.endswith("with vgg9 and weight decay 0.0005")
    assert drawn[3].figure is not None
    assert "vgg9 and weight decay 0.0005" in drawn[3].figure.get_suptitle()


def test_a_page_takes_a_few_variants_of_each_figure(folder: StudyFolder, one_figure: None):
    drawn = list(figures.draw_all(folder, at_most=1))
    assert [drawing.figure is not None for drawing in drawn] == [True, False, False, False]
    assert "lbstudy figures" in drawn[1].reason


@pytest.mark.slow
def test_every_figure_of_every_variant_can_be_drawn(folder: StudyFolder):
    names = {drawing.name for drawing in figures.draw_all(folder) if drawing.figure is not None}
    for kind in (
        "learning_curves",
        "learning_curves_steps",
        "steps_to_target",
        "tuning_curves",
        "sensitivity_learning_rate",
    ):
        assert len([name for name in names if name.startswith(f"{kind}-")]) == 4


def test_commands_show_the_factors(folder: StudyFolder):
    def shown(*arguments: str) -> list[dict[str, object]]:
        result = CliRunner().invoke(app, [*arguments, "--format", "json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    where, every = str(folder.path), {(model, decay) for model in MODELS for decay in DECAYS}
    for table in (shown("best", where), shown("table", where, "gap"), shown("table", where, "health")):
        assert {(row["model"], row["fixed.weight_decay"]) for row in table} == every
    rows = shown("table", where, "targets", "--loss", "0.5")
    losses = [row for row in rows if row["metric"] == "clean_train_loss"]
    assert {row["target"] for row in losses} == {0.5}  # given: the same for all; else each variant's own
    assert len({row["target"] for row in rows if row["metric"] == "val_accuracy"}) == 4


def test_a_narrow_terminal_repeats_the_factors_in_every_block(folder: StudyFolder):
    table = best.for_terminal(best.best_configs(folder))
    blocks = fit_columns(table, 70, best.short_names(best.best_configs(folder)).values())
    assert len(blocks) > 1
    assert all({"model", "weight_decay", "optimizer"} <= set(block) for block in blocks)


def test_confirming_runs_have_the_factors_of_their_cell_and_one_seed_in_all(folder: StudyFolder):
    runs = plan_runs(folder, STUDY, SEEDS + 1, 1, False, "split", print)
    new = [run for run in runs if run.repeat == SEEDS]
    assert {run.cell: run.factors for run in new} == {cell.name: dict(cell.factors) for cell in STUDY.list_cells()}
    assert all(run.run["model"] == run.factors["model"] for run in new)
    assert all(run.run["hyper"]["weight_decay"] == run.factors["fixed.weight_decay"] for run in new)
    assert len({run.seed for run in new}) == 1
