"""Sizes by formula against torch: parameters of the models, and snapshots as torch.save writes them."""

import io

import pytest
import torch
from torch import nn

from lbstudy.methods import optimizers
from lbstudy.methods.models import build
from lbstudy.study import sizes
from lbstudy.study.run import ModelName, RunSpec

SHAPES = {"lenet5": (1, 28, 20), "vgg9": (1, 8, 8), "resnet18": (3, 32, 32)}


@pytest.mark.parametrize("model", ["lenet5", "vgg9", "resnet18"])
@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), ((1, 28, 20), 100)])
def test_parameters_are_those_of_the_model(model: ModelName, shape: tuple[int, int, int], classes: int):
    network = build(model, shape, classes)
    assert sizes.layers(model, shape, classes).parameters == sum(p.numel() for p in network.parameters())


def saved(state: object) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return len(buffer.getvalue())


def snapshot_after_a_step(run: RunSpec, network: nn.Module, shape: tuple[int, int, int]) -> dict[str, object]:
    optimizer = optimizers.build(run, network)
    images, labels = torch.randn(4, *shape), torch.arange(4)
    if isinstance(optimizer, optimizers.KFAC):
        with optimizer.capture(4):
            nn.functional.cross_entropy(network(images), labels).backward()
    else:
        nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    return {"epoch": 1, "step": 1, "model": network.state_dict(), "optimizer": optimizer.state_dict()}


CASES = [
    ("lenet5", "sgd", {}), ("lenet5", "adamw", {}), ("lenet5", "lars", {}), ("lenet5", "kfac", {}),
    ("lenet5", "kfac", {"damping_form": "eigen"}), ("vgg9", "sgd", {}), ("vgg9", "kfac", {}),
    ("vgg9", "kfac", {"batch_norm": "plain"}), ("resnet18", "adamw", {}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "optimizer", "kfac"), CASES)
def test_checkpoint_is_no_larger_than_planned_and_not_much_smaller(
    model: ModelName, optimizer: str, kfac: dict[str, str]
):
    shape = SHAPES[model]
    run = RunSpec.model_validate({
        "model": model, "dataset": {"name": "digits"}, "batch_size": 4, "optimizer": optimizer, "kfac": kfac,
        "hyper": {"learning_rate": 0.01, "momentum": 0.9}, "budget": {"epochs": 1},
    })  # fmt: skip
    network, layers = build(model, shape, 10), sizes.layers(model, shape, 10)
    snapshot = snapshot_after_a_step(run, network, shape)
    assert 1 <= sizes.checkpoint_bytes(layers, run.optimizer, 4) / saved(snapshot) < 1.1
    assert 1 <= sizes.model_bytes(layers, 4) / saved(network.state_dict()) < 1.1
