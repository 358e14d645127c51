"""Factors of the cells beside optimizer, batch size and smoothing: names, variants, runs, files that go on."""

from pathlib import Path
from typing import Any

import pytest

from lbstudy.methods import configure
from lbstudy.methods.checks import load_study, notices
from lbstudy.methods.configure import run_spec
from lbstudy.parallel.randomness import derive_seed
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.factors import in_words, labels, suffix, value_text
from lbstudy.study.file import StudyError
from lbstudy.study.space import Condition
from lbstudy.study.spec import Cell, StudySpec
from tests.conftest import TINY_STUDY, tiny_study

FILE = """\
name: factors
dataset: {name: digits, validation_size: 0.2}
schedule: {name: cosine}
cells:
  optimizer: [sgd]
  batch_size: [32, 128]
  smoothing: [none, mixup]
  fixed.weight_decay: [0, 5e-4]
  budget: {short: {epochs: 2}, long: {epochs: 9}}
  model: [lenet5, vgg9]
  dataset.augment: {none: [], crop: [crop]}
  exclude: [{model: vgg9, budget: long, smoothing: mixup}]
search:
  learning_rate:
    - {log_uniform: [1e-3, 1e-1], when: {model: vgg9, fixed.weight_decay: 0}}
    - {log_uniform: [1e-2, 1]}
  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}
published:
  - {optimizer: sgd, batch_size: 32, smoothing: none, model: vgg9, budget: short, params: {learning_rate: 0.05}}
tuning: {trials: 4, pruner: {name: asha, grace_period: 1, reduction_factor: 3}}
"""
FACTORS = (("model", "vgg9"), ("dataset.augment", "crop"), ("budget", "short"), ("fixed.weight_decay", 0))
CELL = Cell("sgd", 32, "none", FACTORS)


def write(folder: Path, text: str = FILE) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def study(tmp_path: Path) -> StudySpec:
    return load_study(write(tmp_path))


def test_cells_are_the_product_less_what_is_excluded(study: StudySpec):
    assert len(study.all_cells()) == 2 * 2 * 2**4
    assert len(study.left_out()) == 2 * 2 * 2
    assert {dict(cell.factors)["budget"] for cell in study.left_out()} == {"long"}
    names = [cell.name for cell in study.list_cells()]
    assert names[0] == "sgd-b32-none-lenet5-none-short-weight_decay=0"
    assert len(set(names)) == len(names) == 56
    assert CELL in study.list_cells()


def test_a_study_without_further_factors_has_the_names_and_seeds_it_had():
    cell = tiny_study().list_cells()[1]
    assert cell == Cell("sgd", 32, "mixup+noise")
    assert cell.name == "sgd-b32-mixup+noise"
    assert tiny_study().trial_seed(cell, 3) == derive_seed(0, "trial", "sgd-b32-mixup+noise", 3) == 1786571769
    assert tiny_study().variant(cell) == tiny_study()


def test_a_variant_is_the_study_as_the_cell_sees_it(study: StudySpec):
    part = study.variant(CELL)
    assert (part.model.name, part.budget.epochs, part.dataset.augment) == ("vgg9", 2, ("crop",))
    assert part.fixed.numbers["weight_decay"] == 0
    assert [cell.name for cell in part.list_cells()] == [
        f"sgd-b{size}-{smoothing}-vgg9-crop-short-weight_decay=0"
        for size in (32, 128)
        for smoothing in ("none", "mixup")
    ]
    assert part.variant(CELL) is part
    assert part.in_words == "vgg9, augment crop, budget short and weight decay 0"
    assert study.in_words == ""
    cells = [cell for variant in study.variants() for cell in variant.list_cells()]
    assert cells == study.list_cells()


def test_a_run_has_the_values_of_its_cell(study: StudySpec):
    for cell in study.list_cells():
        params = {"learning_rate": 0.1} | ({"mixup_alpha": 0.3} if cell.smoothing == "mixup" else {})
        run, factors = run_spec(study, cell, params, 0), dict(cell.factors)
        assert run.model.name == factors["model"]
        assert run.budget.epochs == {"short": 2, "long": 9}[str(factors["budget"])]
        assert run.dataset.augment == (("crop",) if factors["dataset.augment"] == "crop" else ())
        assert run.hyper["weight_decay"] == factors["fixed.weight_decay"]
        assert run.dataset.validation_size == 0.2


def test_conditions_and_published_configurations_know_factors(study: StudySpec):
    low = [cell for cell in study.list_cells() if study.ranges(cell)["learning_rate"].bounds[0] == 1e-3]
    assert {(dict(c.factors)["model"], dict(c.factors)["fixed.weight_decay"]) for c in low} == {("vgg9", 0)}
    published = [cell for cell in study.list_cells() if study.published_params(cell)]
    assert {cell.values["budget"] for cell in published} == {"short"}
    assert {cell.values["fixed.weight_decay"] for cell in published} == {0, 5e-4}  # not named: any of them
    assert not Condition.model_validate({"model": "lenet5"}).matches(CELL)
    assert Condition.model_validate({"fixed.weight_decay": [0, 1]}).matches(CELL)


def test_the_cell_with_other_factors_equal():
    assert CELL.but(optimizer="kfac", batch_size=128) == Cell("kfac", 128, "none", FACTORS)


def test_the_order_of_a_file_does_not_make_other_cells(study: StudySpec, tmp_path: Path):
    lines = FILE.splitlines()
    turned = "\n".join([*lines[:7], *reversed(lines[7:11]), *lines[11:]]) + "\n"
    assert load_study(write(tmp_path, turned)).list_cells() == study.list_cells()


def test_the_resolved_study_reads_back_the_same(study: StudySpec, tmp_path: Path):
    again = load_study(write(tmp_path, study.to_yaml()))
    assert again.list_cells() == study.list_cells()
    assert [part.model_dump(exclude={"cells"}) for part in again.variants()] == [
        part.model_dump(exclude={"cells"}) for part in study.variants()
    ]


def test_null_and_parts_of_a_mapping_are_named_values_and_come_back(tmp_path: Path):
    text = FILE.replace("  model: [lenet5", "  fixed.gradient_clip: {free: null, clipped: 0.1}\n  model: [lenet5")
    text = text.replace("  model: [lenet5", "  fixed.noise: {once: {copies: 1}, twice: {copies: 2}}\n  model: [lenet5")
    again = load_study(write(tmp_path, load_study(write(tmp_path, text)).to_yaml()))
    assert {part.fixed.settings["noise"]["copies"] for part in again.variants()} == {
        1,
        2,
    }  # of a mapping with other keys, too
    assert {part.fixed.gradient_clip for part in again.variants()} == {None, 0.1}


def test_a_key_on_the_command_line_is_one_key_below_cells(tmp_path: Path):
    study = load_study(write(tmp_path), {"cells.fixed.weight_decay": [0, 1e-4, 1e-3], "cells.exclude": []})
    assert len(study.list_cells()) == 2 * 2 * 2 * 2 * 2 * 3
    with pytest.raises(
        StudyError, match="command line: budget: |cells.budget: the study says `budget: {epochs: 5}` too"
    ):
        load_study(write(tmp_path), {"budget": {"epochs": 5}})


def test_a_study_goes_on_with_more_values_and_not_with_other_ones(study: StudySpec, tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study)
    assert load_study(folder.path / "study.yaml").list_cells() == study.list_cells()
    more = load_study(write(tmp_path), {"cells.fixed.weight_decay": [1e-3, 0, 5e-4]})
    folder.require_extension(more)
    other = load_study(write(tmp_path, FILE.replace("{epochs: 2}", "{epochs: 3}")))
    with pytest.raises(StudyError, match="holds another study"):
        folder.require_extension(other)
    with pytest.raises(StudyError, match="holds another study"):
        folder.require_extension(load_study(write(tmp_path, FILE.replace("vgg9", "resnet18"))))


def test_old_records_without_factors_are_read(tmp_path: Path):
    old = TrialRecord("sgd-b32-none", 0, "sgd", 32, "none", {}, 0, {})
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(old)
    assert folder.trials()[0].factors == {}


def test_rungs_follow_the_budget_of_the_cell(study: StudySpec):
    from lbstudy.training import datasets
    from lbstudy.tuning import tuner

    planned = tuner.plan(study, datasets.load_all(study), [{"CPU": 1.0}])
    assert set(planned.epochs) == {cell.name for cell in study.list_cells()}
    for cell in study.list_cells():
        assert planned.epochs[cell.name] == {"short": 2, "long": 9}[str(cell.values["budget"])]
        assert study.tuning.rungs(planned.epochs[cell.name]) == {2: [1], 9: [1, 3]}[planned.epochs[cell.name]]


def test_data_sets_are_read_once_each_and_told_apart():
    from lbstudy.training import datasets, fitting

    cells: dict[str, Any] = {**TINY_STUDY["cells"], "smoothing": ["none"]}  # type: ignore[dict-item]
    cells |= {"dataset.name": ["digits", "synthetic"], "dataset.validation_size": [0.2, 0.1]}
    study = tiny_study(cells=cells, published=[], search={"learning_rate": {"log_uniform": [1e-3, 1]}})
    data = datasets.load_all(study)
    assert len(data) == 2
    shapes = {
        part.dataset.name: data[datasets.source(part.dataset)].train_images.shape[1:] for part in study.variants()
    }
    assert shapes == {"digits": (1, 32, 32), "synthetic": (3, 32, 32)}
    fitting.check(study, data)


def test_one_mistake_in_the_data_is_told_once_at_the_factor():
    from lbstudy.study.file import KeyProblems
    from lbstudy.training import datasets, fitting

    cells: dict[str, Any] = {**TINY_STUDY["cells"], "dataset.samples": [64, 640], "precision": ["fp32", "bf16"]}  # type: ignore[dict-item]
    study = tiny_study(cells=cells, dataset={"name": "synthetic", "validation_size": 0.2})
    with pytest.raises(KeyProblems) as raised:
        fitting.check(study, datasets.load_all(study))
    (problem,) = raised.value.problems
    assert problem.keys == ("cells", "batch_size")
    assert problem.message.startswith("128 is more than the 51 training samples")
    assert problem.message.endswith("(with samples 64 and precision fp32; 1 more like it)")


def test_factors_without_effect_are_said(study: StudySpec):
    cells: dict[str, Any] = {**TINY_STUDY["cells"], "optimizer": ["sgd", "kfac"], "fixed.damping": [0.1, 1]}  # type: ignore[dict-item]
    study_class = configure.study_class(("sgd", "kfac"), ("none", "mixup+noise"))
    (notice,) = notices(study_class.model_validate({**TINY_STUDY, "cells": cells}))
    assert notice.startswith("cells.fixed.damping: has no effect in sgd-b32-none-damping=0.1 and 7 more cells")
    assert list(notices(study)) == []


def test_names_of_factors_are_as_short_as_they_can_be():
    keys = ["model", "dataset.name", "schedule.name", "batch_norm", "fixed.kfac.batch_norm", "fixed.weight_decay"]
    assert labels(keys) == {
        "model": "model", "dataset.name": "dataset", "schedule.name": "schedule", "batch_norm": "batch_norm",
        "fixed.kfac.batch_norm": "kfac.batch_norm", "fixed.weight_decay": "weight_decay",
    }  # fmt: skip
    factors = (("model", "vgg9"), ("fixed.weight_decay", 5e-4), ("fixed.nesterov", True), ("budget", "long"))
    assert suffix(factors) == "-vgg9-weight_decay=0.0005-nesterov=true-long"
    assert in_words(factors) == "vgg9, weight decay 0.0005, nesterov true and budget long"
    assert [value_text(v) for v in (0, 0.0, 5e-5, 1 / 3, 1e6)] == ["0", "0", "5e-05", "0.3333333333333333", "1e+06"]


def test_two_cells_of_one_name_are_refused(tmp_path: Path):
    text = FILE.replace("schedule: {name: cosine}\n", "").replace("{short: ", "{s-a: ").replace("long: {ep", "s: {ep")
    text = text.replace("budget: long, ", "").replace("budget: short, ", "")
    text = text.replace(
        "  dataset.augment: {none: [], crop: [crop]}\n", "  schedule: {b: {warmup: 1}, a-b: {warmup: 2}}\n"
    )
    with pytest.raises(StudyError, match="two cells would be called sgd-b32-none-lenet5-s-a-b-weight_decay=0; give"):
        load_study(write(tmp_path, text))


def test_the_example_of_the_documentation_says_what_it_makes(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "study-file.md").read_text()
    section = text[text.index("### Factors") : text.index("## tuning")]
    study = load_study(write(tmp_path, section.partition("```yaml\n")[2].partition("```")[0]))
    names = [cell.name for cell in study.list_cells()]
    prose = " ".join(section.split())
    assert f"These are {len(names)} cells, from `{names[0]}` to `{names[-1]}`" in prose
    assert len({(cell.values["budget"], cell.values["dataset.augment"]) for cell in study.list_cells()}) == 3
