"""The factor `budget` that splits a gap: what it stands for, how long its runs are, and what is wrong with one."""

from pathlib import Path
from typing import Any

import pytest

from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.study.file import StudyError
from lbstudy.study.run import Budget, Schedule
from lbstudy.study.spec import Cell, StudySpec

FILE = """\
name: splitting
model: lenet5
dataset: {name: digits, validation_size: 0.2}
budget: {epochs: 30}
schedule: {name: multi_step, milestones: [21], factor: 0.1, warmup: 3}
cells:
  optimizer: [sgd]
  batch_size: [32, 64, 256]
  smoothing: [none]
  budget: [same_epochs, same_updates, fewer_updates]
search:
  learning_rate: {log_uniform: [1e-3, 1e-1]}
tuning: {trials: 4, pruner: {name: asha, grace_period: 3, reduction_factor: 3}}
"""
SAMPLES = 1437
"""Of the digits, without those that validate: 45, 23 and 6 mini-batches of 32, 64 and 256."""


def write(folder: Path, text: str = FILE) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def study(tmp_path: Path) -> StudySpec:
    return load_study(write(tmp_path))


def test_budgets_that_are_the_same_run_make_one_cell(study: StudySpec):
    assert [cell.name for cell in study.list_cells()] == [
        "sgd-b32-none-same_epochs", "sgd-b64-none-same_epochs", "sgd-b256-none-same_epochs",
        "sgd-b64-none-same_updates", "sgd-b256-none-same_updates", "sgd-b32-none-fewer_updates",
    ]  # fmt: skip
    assert study.left_out() == []
    assert [part.splits for part in study.variants()] == [None, "same_updates", "fewer_updates"]
    assert [part.in_words for part in study.variants()] == ["", "budget same_updates", "budget fewer_updates"]
    assert study.compared() == study.variants()[:1]


def test_the_order_of_the_names_does_not_count(study: StudySpec, tmp_path: Path):
    turned = FILE.replace("[same_epochs, same_updates, fewer_updates]", "[fewer_updates, same_epochs, same_updates]")
    assert load_study(write(tmp_path, turned)).list_cells() == study.list_cells()


def test_a_cell_splits_the_gap_to_the_smallest_or_the_largest_batch(study: StudySpec):
    ends = {
        cell.name: [end.name for end in study.ends(cell)]
        for cell in study.list_cells()
        if study.variant(cell).splits is not None
    }
    assert ends == {
        "sgd-b64-none-same_updates": ["sgd-b32-none-same_epochs", "sgd-b64-none-same_epochs"],
        "sgd-b256-none-same_updates": ["sgd-b32-none-same_epochs", "sgd-b256-none-same_epochs"],
        "sgd-b32-none-fewer_updates": ["sgd-b32-none-same_epochs", "sgd-b256-none-same_epochs"],
    }
    part = study.variants()[1]
    assert study.whole(part) == study.variants()[0]


@pytest.mark.parametrize(
    ("name", "size", "steps", "epochs", "images"),
    [
        ("same_epochs", 32, 30 * 45, 30, 30 * SAMPLES),
        ("same_epochs", 256, 30 * 6, 30, 30 * SAMPLES),
        ("same_updates", 64, 30 * 45, 59, 58 * SAMPLES + 16 * 64),  # 1,350 = 58 x 23 + 16
        ("same_updates", 256, 30 * 45, 225, 225 * SAMPLES),
        ("fewer_updates", 32, 30 * 6, 4, 4 * SAMPLES),
    ],
)
def test_updates_are_those_of_the_other_batch_size_exactly(
    name: str, size: int, steps: int, epochs: int, images: int, study: StudySpec
):
    cell = Cell("sgd", size, "none", (("budget", name),))
    run = run_spec(study, cell, {"learning_rate": 0.1}, 0)
    for extent in (study.extent(cell, SAMPLES), run.extent(SAMPLES)):
        assert (extent.steps, extent.epochs, extent.images()) == (steps, epochs, images)


def test_images_are_counted_mini_batch_by_mini_batch():
    for drop_last in (False, True):
        extent = Budget(epochs=7, updates_of=16).extent(100, 30, drop_last)
        starts = [start for start in range(0, 100, 30) if not drop_last or start + 30 <= 100]
        seen, counted = 0, []
        for step in range(extent.steps):
            seen += min(30, 100 - starts[step % len(starts)])
            counted.append(seen)
        assert [extent.images(step + 1) for step in range(extent.steps)] == counted
        assert extent.steps == 7 * (6 if drop_last else 7)


def test_the_schedule_lies_at_the_same_share_of_every_budget(study: StudySpec):
    """Step for step that of the batch size whose updates they are, though an epoch has other steps."""

    def rates(name: str, size: int) -> list[float]:
        run = run_spec(study, Cell("sgd", size, "none", (("budget", name),)), {"learning_rate": 0.1}, 0)
        extent = run.extent(SAMPLES)
        return [run.schedule.rate_factor(s, run.budget, extent.steps_per_epoch) for s in range(extent.steps)]

    small, large = rates("same_epochs", 32), rates("same_epochs", 256)
    assert rates("same_updates", 256) == rates("same_updates", 64) == small
    assert rates("fewer_updates", 32) == large
    assert small.index(0.1, 3 * 45) == 20 * 45  # milestone 21: two thirds
    assert large.index(0.1, 3 * 6) == 20 * 6


def test_a_cosine_ends_with_the_budget():
    budget, cosine = Budget(epochs=2, updates_of=10), Schedule(name="cosine")
    extent = budget.extent(100, 50)
    assert (extent.steps, extent.steps_per_pass) == (20, 2)
    assert cosine.rate_factor(10, budget, extent.steps_per_epoch) == pytest.approx(0.5)


def test_rungs_lie_at_the_same_share_of_every_budget(study: StudySpec):
    rungs = {cell.name: study.rungs(cell, study.extent(cell, SAMPLES).epochs) for cell in study.list_cells()}
    assert rungs["sgd-b32-none-same_epochs"] == [3, 9, 27]
    assert rungs["sgd-b256-none-same_updates"] == [3 * 8, 9 * 8, 27 * 8]
    assert rungs["sgd-b64-none-same_updates"] == [6, 18, 54]
    assert rungs["sgd-b32-none-fewer_updates"] == [1, 2, 4]  # of 4 epochs: 3/8, 9/8 and 27/8


def test_the_pruner_counts_rungs_as_the_study_does(study: StudySpec):
    from lbstudy.tuning.pruner import StudyPruner
    from lbstudy.tuning.search import Past

    cell = Cell("sgd", 64, "none", (("budget", "same_updates"),))
    epochs = {cell.name: study.extent(cell, SAMPLES).epochs}
    best = [Past(cell, number, {}, "completed", (0.9,) * 59) for number in range(3)]
    pruner = StudyPruner(study, epochs, best)
    assert not pruner.replay(Past(cell, 7, {}, "running", (0.1,) * 5))
    assert pruner.replay(Past(cell, 7, {}, "running", (0.1,) * 6))


def test_a_study_comes_back_from_its_folder(study: StudySpec, tmp_path: Path):
    again = load_study(write(tmp_path, study.to_yaml()))
    assert again.list_cells() == study.list_cells()
    assert [part.budget for part in again.variants()] == [
        Budget(epochs=30), Budget(epochs=30, updates_of=32), Budget(epochs=30, updates_of=256),
    ]  # fmt: skip


def test_epochs_of_the_command_line_are_those_of_every_budget(tmp_path: Path):
    study = load_study(write(tmp_path), {"budget": {"epochs": 4}, "schedule": {"name": "constant"}})
    assert [part.budget.in_words for part in study.variants()] == [
        "4 epochs",
        "as many updates as batch 32 makes in 4 epochs",
        "as many updates as batch 256 makes in 4 epochs",
    ]


def test_any_study_may_count_the_updates_of_one_batch_size(tmp_path: Path):
    text = FILE.replace("  budget: [same_epochs, same_updates, fewer_updates]\n", "")
    study = load_study(write(tmp_path, text.replace("{epochs: 30}", "{epochs: 30, updates_of: 64}")))
    assert {study.extent(cell, SAMPLES).steps for cell in study.list_cells()} == {30 * 23}


def test_conditions_and_the_learning_rate_rule_go_with_it(tmp_path: Path):
    text = FILE.replace(
        "  learning_rate: {log_uniform: [1e-3, 1e-1]}",
        "  learning_rate: [{log_uniform: [1e-2, 1], when: {budget: same_updates}}, {log_uniform: [1e-3, 1e-1]}]",
    ).replace("trials: 4,", "trials: 4, learning_rate_rule: {from: 32, rule: sqrt},")
    study = load_study(write(tmp_path, text))
    ranges = {cell.name: study.ranges(cell)["learning_rate"].bounds for cell in study.list_cells()}
    assert {name for name, bounds in ranges.items() if bounds == (1e-2, 1)} == {
        "sgd-b64-none-same_updates",
        "sgd-b256-none-same_updates",
    }


def test_a_cell_with_more_updates_takes_its_first_rate_from_the_same_reference(tmp_path: Path):
    from lbstudy.tuning.search import StudySearch

    text = FILE.replace("trials: 4,", "trials: 4, learning_rate_rule: {from: 32, rule: linear},")
    study, told = load_study(write(tmp_path, text)), list[str]()
    names = {cell.name: cell for cell in study.list_cells()}
    search = StudySearch.__new__(StudySearch)
    search._study, search._notice = study, told.append

    class Best:
        def best_params(self) -> dict[str, float]:
            return {"learning_rate": 0.002}

    search._searches = dict.fromkeys(names.values(), Best())  # type: ignore[arg-type]
    for cell, expected in (("sgd-b256-none-same_epochs", 0.016), ("sgd-b256-none-same_updates", 0.016)):
        found: Any = search._scaled_rate(names[cell])
        assert found["learning_rate"] == pytest.approx(expected)
    assert search._scaled_rate(names["sgd-b32-none-fewer_updates"]) is None


WRITTEN = "budget: [same_epochs, same_updates, fewer_updates]"
OWN = "budget: {epochs: 30}\n"
WRONG = {
    "misspelt": (WRITTEN, "budget: [same_epochs, same_update]",
                 "10: cells.budget.1: unknown budget 'same_update'; did you mean `same_updates`?"),
    "another": (WRITTEN, "budget: [same_epochs, long]",
                "unknown budget 'long'; known are same_epochs, same_updates, fewer_updates; one of your own is written "
                "`{NAME: ...}`"),
    "no gap": (WRITTEN, "budget: [same_updates, fewer_updates]",
               "the gap that is split is that of same_epochs, which is missing; got ['same_updates', 'fewer_updates']"),
    "alone": (WRITTEN, "budget: [same_epochs]",
              "same_epochs is the study's own budget; beside it there must be same_updates or fewer_updates"),
    "twice": (WRITTEN, "budget: [same_epochs, same_updates, same_updates]", "each value once"),
    "no budget": (OWN, "", "cells.budget: same_epochs is the study's own budget, which is missing: `budget: {epochs: N}`"),
    "steps": (OWN, "budget: {steps: 500}\n",
              "with a budget in steps every batch size makes the same number of updates already; the split needs "
              "`budget: {epochs: N}`, but got `budget: {steps: 500}`"),
    "updates": (OWN, "budget: {epochs: 3, updates_of: 32}\n",
                "the study's own budget is in the updates of one batch size already"),
    "one batch size": ("[32, 64, 256]", "[64]",
                       "the split needs two batch sizes or more, but got cells.batch_size [64]"),
    "other steps": (f"  {WRITTEN}", "  budget: {same_epochs: {epochs: 30}, same_updates: {steps: 10560}}",
                    "cells.budget.same_updates: the name stands for `{epochs: 30, updates_of: 32}`, the updates of batch "
                    "size 32; got {steps: 10560}. In short: `budget: {epochs: 30}` with "
                    "`cells.budget: [same_epochs, same_updates]`"),
    "own in steps": (f"  {WRITTEN}", "  budget: {same_epochs: {steps: 30}, same_updates: {epochs: 3}}",
                     "cells.budget.same_epochs: must be a budget in epochs, `{epochs: N}`; got {steps: 30}"),
    "an end left out": (WRITTEN, f"{WRITTEN}\n  exclude: [{{batch_size: 256, budget: same_epochs}}]",
                        "cells.exclude: leaves out sgd-b256-none-same_epochs, an end of the gap that "
                        "sgd-b256-none-same_updates splits"),
    "updates of steps": (OWN, "budget: {steps: 3, updates_of: 32}\n", "budget"),
    "not epochs": (OWN, "budget: {epochs: many}\n", "budget.epochs: input should be a whole number; got 'many'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error_for_each_mistake(case: str, tmp_path: Path):
    old, new, message = WRONG[case]
    text = FILE.replace(old, new)
    assert text != FILE
    if new.startswith("  budget: {same"):  # written out, the budget need not be there
        text = text.replace(OWN, "")
    with pytest.raises(StudyError) as raised:
        load_study(write(tmp_path, text))
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_updates_of_goes_with_epochs():
    with pytest.raises(ValueError, match="`updates_of` goes with `epochs`"):
        Budget(steps=3, updates_of=32)


def test_the_shipped_study_splits_both_ways(tmp_path: Path):
    from lbstudy.study.load import find_study

    study = load_study(find_study("cifar10_split_gap"))
    assert {part.splits for part in study.variants()} == {None, "same_updates", "fewer_updates"}
    costs = {cell.name: study.extent(cell, 45_000) for cell in study.list_cells()}
    assert costs["sgd-b2048-none-same_updates"].steps == costs["sgd-b128-none-same_epochs"].steps == 10_560
    assert costs["sgd-b128-none-fewer_updates"].steps == costs["sgd-b2048-none-same_epochs"].steps == 660


def test_the_example_of_the_documentation_is_as_it_says(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "study-file.md").read_text()
    section = text[text.index("#### The gap, split") : text.index("## tuning")]
    study = load_study(write(tmp_path, section.partition("```yaml\n")[2].partition("```")[0]))
    assert f"the study above has {len(study.list_cells())}, not 24" in section
    large = study.extent(Cell("sgd", 256, "none", (("budget", "same_updates"),)), SAMPLES)
    small = study.extent(Cell("sgd", 32, "none", (("budget", "fewer_updates"),)), SAMPLES)
    assert (large.steps, 20 * large.steps_per_epoch, 150 * large.steps_per_pass) == (1350, 900, 900)
    assert (small.steps, 20 * small.steps_per_epoch, 120 // small.steps_per_pass) == (180, 120, 2)
