"""The study file: what it may say, and what is said about a wrong one."""

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.study.file import StudyError, parse_override
from lbstudy.study.load import SHIPPED_STUDIES, find_study
from lbstudy.study.run import Budget, Schedule
from lbstudy.study.space import Condition, Range
from lbstudy.study.spec import Cell, StudySpec

GOOD = """\
name: tiny
model: lenet5
dataset: {name: digits}
budget: {epochs: 2}
cells: {optimizer: [sgd], batch_size: [32, 64], smoothing: [none, mixup, mixup+noise]}
search:
  learning_rate:
    - {log_uniform: [1e-3, 1e-1], when: {batch_size: 32}}
    - {log_uniform: [1e-2, 1]}
  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}
  noise_magnitude: {choice: [0.001, 0.01], when: {smoothing: noise}}
published:
  - {optimizer: sgd, batch_size: 64, smoothing: mixup, params: {learning_rate: 0.5}}
tuning: {trials: 4}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def shipped() -> list[Path]:
    return sorted(path for folder in SHIPPED_STUDIES for path in folder.glob("*.yaml"))


def test_cells_are_the_product_and_tune_what_they_use(tmp_path: Path):
    study = load_study(write(tmp_path, GOOD))
    assert [cell.name for cell in study.list_cells()] == [
        "sgd-b32-none", "sgd-b32-mixup", "sgd-b32-mixup+noise", "sgd-b64-none", "sgd-b64-mixup", "sgd-b64-mixup+noise",
    ]  # fmt: skip
    tuned = {cell.name: list(study.ranges(cell)) for cell in study.list_cells()}
    assert tuned["sgd-b32-none"] == ["learning_rate"]
    assert tuned["sgd-b32-mixup"] == ["learning_rate", "mixup_alpha"]
    assert tuned["sgd-b64-mixup+noise"] == ["learning_rate", "mixup_alpha", "noise_magnitude"]
    assert study.ranges(Cell("sgd", 32, "none"))["learning_rate"].bounds == (1e-3, 1e-1)
    assert study.ranges(Cell("sgd", 64, "none"))["learning_rate"].bounds == (1e-2, 1)
    assert study.published_params(Cell("sgd", 64, "mixup")) == [{"learning_rate": 0.5}]


def test_exclude_leaves_combinations_out(tmp_path: Path):
    study = load_study(write(tmp_path, GOOD), {"cells.exclude": [{"batch_size": 32, "smoothing": "mixup"}]})
    assert [c.name for c in study.left_out()] == ["sgd-b32-mixup", "sgd-b32-mixup+noise"]
    assert len(study.list_cells()) == 4


def test_run_spec_holds_what_the_cell_uses(tmp_path: Path):
    study = load_study(write(tmp_path, GOOD), {"fixed.weight_decay": 1e-3})
    run = run_spec(study, Cell("sgd", 32, "mixup"), {"learning_rate": 0.1, "mixup_alpha": 0.3}, seed=5)
    assert run.hyper == {
        "learning_rate": 0.1, "mixup_alpha": 0.3, "weight_decay": 1e-3, "momentum": 0.9, "nesterov": False,
    }  # fmt: skip
    assert run.settings == {"mixup": {"per": "mini_batch"}}
    assert (run.seed, run.split_seed) == (5, study.seed)


def test_resolved_study_reads_back_the_same(tmp_path: Path):
    study = load_study(write(tmp_path, GOOD))
    again = tmp_path / "resolved.yaml"
    again.write_text(study.to_yaml())
    assert load_study(again) == study


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_shipped_studies_are_sound(path: Path):
    study = load_study(path)
    assert study.name == path.stem
    assert study.source
    assert study.list_cells()
    assert study.tuning.pruner != "none"


def test_the_slides_table_2_is_what_is_published():
    study = load_study(find_study("hpml2019_lenet5.yaml"))
    rates = {(p.optimizer, p.batch_size, p.smoothing): p.params["learning_rate"] for p in study.published}
    assert rates == {
        ("sgd", 128, "mixup"): 5e-3, ("sgd", 128, "none"): 1e-3, ("sgd", 2048, "mixup"): 1e-2, ("sgd", 2048, "none"): 5e-3,
        ("kfac", 128, "mixup"): 5e-3, ("kfac", 128, "none"): 2e-3, ("kfac", 2048, "mixup"): 8e-3, ("kfac", 2048, "none"): 4e-3,
    }  # fmt: skip
    assert study.schedule.rate_factor(70 * 10 - 1, study.budget, 10) == 1.0
    assert study.schedule.rate_factor(70 * 10, study.budget, 10) == 0.5  # epoch 71, counted from 1, begins here


BAD = {
    "misspelt key": (("tuning:", "tunning:"), ["tunning", "did you mean `tuning`"]),
    "misspelt nested key": (("trials: 4", "trails: 4"), ["study.yaml:14: tuning.trails: unknown key", "`trials`"]),
    "unknown model": (("lenet5", "lenet6"), ["study.yaml:2: model", "there is no model 'lenet6'", "lenet5"]),
    "unknown parameter": (("mixup_alpha:", "mixup_alfa:"), ["search.mixup_alfa", "did you mean `mixup_alpha`"]),
    "inverted range": (("[0.1, 1]", "[1, 0.1]"), ["study.yaml:10: search.mixup_alpha", "got low=1, high=0.1"]),
    "log of zero": (("[1e-2, 1]", "[0, 1]"), ["search.learning_rate.1", "`low > 0` must hold", "low=0"]),
    "alpha without mixup": (("when: {smoothing: mixup}", "when: {}"), ["search.mixup_alpha", "no effect in cell sgd-b32-none"]),
    "mixup without alpha": (("  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}\n", ""), ["needs it", "mixup_alpha"]),
    "published outside": (("learning_rate: 0.5", "learning_rate: 5"), ["published.0.params.learning_rate", "outside", "[0.01, 1]"]),
    "published for no cell": (("batch_size: 64, smoothing: mixup", "batch_size: 99, smoothing: mixup"), ["sgd-b99-mixup is no cell"]),
    "duplicate key": (("model: lenet5\n", "model: lenet5\nmodel: vgg9\n"), ["study.yaml:3", "duplicate key"]),
    "epochs and steps": (("{epochs: 2}", "{epochs: 2, steps: 9}"), ["budget", "either `epochs` or `steps`"]),
    "unsafe name": (("name: tiny", "name: ../tiny"), ["study.yaml:1: name", "'../tiny'"]),
    "zero trials": (("trials: 4", "trials: 0"), ["tuning.trials", "greater than 0", "got 0"]),
    "not yaml": (("cells: {", "cells: {{"), ["study.yaml:", "not valid YAML"]),
    "batch size twice": (("[32, 64]", "[32, 32]"), ["cells.batch_size", "each value once"]),
    "rate for no optimizer": (("optimizer: [sgd]", "optimizer: [sdg]"), ["study.yaml:5: cells.optimizer.0: there is no optimizer 'sdg'; did you mean sgd?"]),
    "momentum of one": (("tuning:", "fixed: {momentum: 1}\ntuning:"), ["fixed.momentum", "less than 1"]),
    "milestones for cosine": (("tuning:", "schedule: {name: cosine, milestones: [3]}\ntuning:"), ["schedule", "`milestones`"]),
    "K-FAC's milestones out of order": (
        ("tuning:", "fixed: {kfac: {interval_milestones: [5, 3], interval_factor: 2}}\ntuning:"), ["fixed.kfac", "`interval_milestones`", "[5, 3]"]
    ),
    "wrong direction": (("trials: 4", "trials: 4, metric: val_loss, direction: maximize"), ["tuning", "minimize"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_study_is_explained(tmp_path: Path, case: str):
    (old, new), expected = BAD[case]
    assert old in GOOD
    with pytest.raises(StudyError) as raised:
        load_study(write(tmp_path, GOOD.replace(old, new)))
    for part in expected:
        assert part in str(raised.value)


def test_batch_norm_that_micro_batches_would_change_is_refused(tmp_path: Path):
    overrides = {"model": "vgg9", "resources.micro_batch_size": 24}
    path = write(tmp_path, GOOD)
    with pytest.raises(StudyError, match="needs all of it in one forward pass"):
        load_study(path, overrides)
    with pytest.raises(StudyError, match="must be a multiple of batch_norm.ghost = 16"):
        load_study(path, overrides | {"batch_norm": {"ghost": 16}})
    assert load_study(path, overrides | {"batch_norm": {"ghost": 12}})


def test_all_problems_are_told_at_once(tmp_path: Path):
    with pytest.raises(StudyError) as raised:
        load_study(write(tmp_path, GOOD.replace("lenet5", "x").replace("trials: 4", "trials: none")))
    assert len(str(raised.value).splitlines()) == 2


def test_overrides(tmp_path: Path):
    assert parse_override("tuning.trials=7") == ("tuning.trials", 7)
    assert parse_override("budget={epochs: 3}") == ("budget", {"epochs": 3})
    study = load_study(write(tmp_path, GOOD), {"tuning.trials": 7, "resources.workers": 2})
    assert (study.tuning.trials, study.resources.workers) == (7, 2)
    with pytest.raises(StudyError, match="KEY=VALUE"):
        parse_override("tuning.trials")
    with pytest.raises(StudyError, match="`name` is not a mapping"):
        load_study(write(tmp_path, GOOD), {"name.first": "x"})
    with pytest.raises(StudyError, match="shipped studies are"):
        find_study("nowhere.yaml")


def test_schedules():
    budget = Budget(epochs=10)
    cosine = Schedule(name="cosine", warmup=2)
    assert [round(cosine.rate_factor(s, budget, 4), 3) for s in (0, 7, 20, 39)] == [0.125, 0.926, 0.5, 0.002]
    steps = Schedule(name="multi_step", milestones=[5, 8], factor=0.1)
    assert [steps.rate_factor(s, Budget(steps=9), 4) for s in (3, 4, 7)] == pytest.approx([1, 0.1, 0.01])
    assert Schedule().rate_factor(3, budget, 4) == 1


@pytest.mark.parametrize("end", [0.0, 0.25])
def test_linear_schedules_are_those_of_torch(end: float):
    """Over 40 steps: torch's LinearLR, after SequentialLR's level part for warmup_stable_decay."""
    budget, steps = Budget(epochs=10), 40
    for name, decay, level in (("linear", 0.5, 0), ("linear", 1.0, 0), ("warmup_stable_decay", 0.25, 30)):
        rate = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=1.0)
        line = LinearLR(rate, start_factor=1.0, end_factor=end, total_iters=round(decay * steps))
        expected = []
        for step in range(steps):
            expected.append(rate.param_groups[0]["lr"])
            rate.step()
            if step >= level:
                line.step()
        found = Schedule.model_validate({"name": name, "decay": decay, "end_factor": end})
        assert [found.rate_factor(s, budget, 4) for s in range(steps)] == pytest.approx(expected, abs=1e-12)
        warm = found.model_copy(update={"warmup": 2})
        assert [warm.rate_factor(s, budget, 4) for s in (0, 7)] == pytest.approx([expected[0] / 8, expected[7]])


def test_numbers_of_one_schedule_are_refused_in_another():
    for wrong in ({"name": "linear"}, {"decay": 0.5}, {"name": "cosine", "end_factor": 0.1}):
        with pytest.raises(ValueError, match="`(decay|end_factor)` is "):
            Schedule.model_validate(wrong)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Schedule.model_validate({"name": "linear", "decay": 1.5})


def test_budget_in_steps_counts_whole_epochs():
    for budget, steps, epochs in ((Budget(steps=9), 9, 3), (Budget(epochs=9), 36, 9)):
        extent = budget.extent(samples=38, batch_size=10)
        assert (extent.steps, extent.epochs, budget.total_steps(4)) == (steps, epochs, steps)


def test_edges():
    log = Range(log_uniform=(1e-4, 1))
    assert [log.edge(v) for v in (1.4e-4, 1e-2, 0.7)] == ["low", None, "high"]
    assert [Range.model_validate({"int": (1, 9)}).edge(v) for v in (1, 5, 9)] == ["low", None, "high"]
    assert [Range(choice=[3, 1, 2]).edge(v) for v in (1, 2, 3)] == ["low", None, "high"]
    assert [Range(choice=[0.9, 0.99]).edge(v) for v in (0.9, 0.99)] == [None, None]  # one of them is always the best


def test_condition_matches_parts_of_a_smoothing():
    assert Condition(smoothing=["mixup"]).matches(Cell("sgd", 1, "mixup+noise"))
    assert not Condition(smoothing=["none"]).matches(Cell("sgd", 1, "mixup"))
    assert not Condition(smoothing=["mixup+noise"]).matches(Cell("sgd", 1, "mixup"))


def test_trial_seeds_differ(tmp_path: Path):
    study = load_study(write(tmp_path, GOOD))
    seeds = {study.trial_seed(cell, n) for cell in study.list_cells() for n in range(50)}
    assert len(seeds) == 300


def test_rungs(tmp_path: Path):
    def rungs(epochs: int, **asha: float) -> list[int]:
        study = load_study(write(tmp_path, GOOD), {"tuning.pruner": {"name": "asha", **asha}})
        return study.tuning.rungs(epochs)

    assert rungs(27, grace_period=1, reduction_factor=3) == [1, 3, 9]
    assert rungs(10, grace_period=2, reduction_factor=1.5) == [2, 3, 5, 7]  # at 2, 3, 4.5, 6.75
    assert load_study(write(tmp_path, GOOD)).tuning.rungs(10) == []


def test_schema_names_every_key():
    schema = StudySpec.model_json_schema(by_alias=True)
    assert set(schema["properties"]) == set(
        [
            "name",
            "source",
            "code",
            "model",
            "dataset",
            "budget",
            "schedule",
            "fixed",
            "cells",
            "search",
            "published",
            "tuning",
            "resources",
            "batch_norm",
            "precision",
            "evaluate_every",
            "seed",
            "labels",
        ]
    )


def test_numbers_of_the_schedule_are_tuned(tmp_path: Path):
    course = {"schedule": {"name": "linear", "decay": 0.5}, "budget.epochs": 10}
    entry = {"schedule.decay": {"uniform": [0.2, 1]}, "schedule.warmup": {"uniform": [0, 5]}}
    path = write(tmp_path, GOOD)
    study = load_study(path, {**course, **{f"search.{name}": value for name, value in entry.items()}})
    cell = study.list_cells()[0]
    run = run_spec(study, cell, {"learning_rate": 0.1, "schedule.decay": 0.25, "schedule.warmup": 2}, seed=0)
    assert (run.schedule.decay, run.schedule.warmup) == (0.25, 2)
    assert run.schedule.rate_factor(0, run.budget, 1) == 0.5
    assert run.schedule.rate_factor(6, run.budget, 1) == 0  # it has come to its end after a quarter
    with pytest.raises(StudyError, match="search.schedule.warmup: must be no longer than the budget of 10; got 50"):
        load_study(path, {**course, "search.schedule.warmup": {"uniform": [0, 50]}})
    with pytest.raises(StudyError, match="search.schedule.decay: not a hyper-parameter"):
        load_study(path, {"search.schedule.decay": {"uniform": [0.2, 1]}})
    with pytest.raises(StudyError, match="search.schedule.decay.* is not allowed"):
        load_study(path, {**course, "search.schedule.decay": {"uniform": [0.2, 2]}})
