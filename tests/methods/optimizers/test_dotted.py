"""Optimizers of other packages, by their names alone."""

from pathlib import Path

import pytest
import torch

from lbstudy.methods import optimizers
from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.methods.declaration import MethodError
from lbstudy.study.file import StudyError
from lbstudy.training.train import train
from tests.training.test_train import digits, make_run

STUDY = """\
name: others
model: lenet5
dataset: {name: digits, validation_size: 0.2}
budget: {epochs: 2}
cells:
  optimizer: ["torch.optim:NAdam", "timm.optim:Adan", "timm.optim:Lion"]
  batch_size: [64]
  smoothing: [none, mixup]
search:
  learning_rate: {log_uniform: [1e-4, 1e-2]}
  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}
  momentum_decay: {log_uniform: [1e-3, 1e-2], when: {optimizer: "torch.optim:NAdam"}}
fixed: {weight_decay: 1e-4, beta3: 0.98, "torch.optim:NAdam": {decoupled_weight_decay: true}}
tuning: {trials: 1}
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "others.yaml"
    path.write_text(text)
    return path


def test_a_study_of_optimizers_from_elsewhere_trains(tmp_path: Path):
    pytest.importorskip("timm")
    study = load_study(write(tmp_path))
    names = [cell.name for cell in study.list_cells()]
    assert names[:2] == ["NAdam-b64-none", "NAdam-b64-mixup"]
    assert study.label("timm.optim:Adan") == "Adan"
    _, data = digits(200)
    for cell in study.list_cells():
        params = {name: entry.bounds[0] for name, entry in study.ranges(cell).items()}
        run = run_spec(study, cell, params | {"learning_rate": 3e-3}, seed=0)
        losses: list[float] = []
        train(run, data, on_epoch=lambda report, _, kept=losses: kept.append(report.train_loss))
        assert losses[1] < losses[0], cell.name


def test_numbers_are_those_of_the_constructor():
    numbers = optimizers.get("torch.optim:NAdam").numbers.model_fields
    assert {name: field.default for name, field in numbers.items() if field.annotation is float} == {
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0, "momentum_decay": 4e-3,
    }  # fmt: skip
    dataset, _ = digits(100)
    hyper = {"learning_rate": 0.1, "beta2": 0.99, "momentum_decay": 0.01}
    run = make_run(dataset, optimizer="torch.optim:NAdam", hyper=hyper)
    group = optimizers.build(run, torch.nn.Linear(2, 2)).param_groups[0]
    assert group["betas"] == (0.9, 0.99)
    assert (group["lr"], group["momentum_decay"]) == (0.1, 0.01)


def test_a_run_by_name_is_torchs_own(tmp_path: Path):
    """A declaration of ours and the same optimizer by its dotted name train alike, to the bit."""
    dataset, data = digits(200)
    hyper = {"weight_decay": 1e-3, "learning_rate": 1e-3}
    ours, theirs = (
        train(make_run(dataset, optimizer=name, hyper=hyper), data) for name in ("adamw", "torch.optim:AdamW")
    )
    assert ours.fingerprint == theirs.fingerprint


def test_weight_decay_may_leave_out_norms_and_biases():
    dataset, _ = digits(100)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for name in ("sgd", "adamw", "lamb", "lars", "torch.optim:NAdam"):
        run = make_run(dataset, optimizer=name, weight_decay_of="weights", hyper={"weight_decay": 0.1})
        groups = optimizers.build(run, model).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert [decays[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0]


@pytest.mark.parametrize("name", ["kfac", "muon"])
def test_a_single_group_leaves_them_out_as_well(name: str):
    """Optimizers with groups of their own: without a gradient, decay alone moves the parameters."""
    dataset, data = digits(100)
    hyper = {"weight_decay": 0.1, "learning_rate": 0.5}
    models = []
    for of in ("all", "weights"):
        run = make_run(dataset, optimizer=name, weight_decay_of=of, hyper=hyper, budget={"steps": 2})
        models.append(dict(train(run, data).model.named_parameters()))
    differ = {key for key in models[0] if not torch.equal(models[0][key], models[1][key])}
    assert any(key.endswith("bias") for key in differ)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torch.optim:NAdams", "there is no attribute 'NAdams' in torch.optim; did you mean NAdam"),
        ("torch.optims:NAdam", "torch.optims"),
        ("torch.optim:Optimizer", "has no `lr`"),
        ("torch.optim:lr_scheduler", "is a module, not a class or function"),
        ("torch.optim:", "should be `module:name`"),
        ("nadam", "there is no optimizer 'nadam'; did you mean adamw"),
    ],
)
def test_names_of_nothing(name: str, reason: str):
    with pytest.raises(MethodError, match=reason):
        optimizers.get(name)


def test_a_wrong_number_gives_the_right_ones(tmp_path: Path):
    pytest.importorskip("timm")
    with pytest.raises(StudyError, match="search.momentum_decoy: not a hyper-parameter; did you mean `momentum_decay`"):
        load_study(write(tmp_path, STUDY.replace("momentum_decay:", "momentum_decoy:")))
    with pytest.raises(StudyError, match="has no effect in cell Adan-b64-none"):
        load_study(write(tmp_path, STUDY.replace(', when: {optimizer: "torch.optim:NAdam"}', "")))
