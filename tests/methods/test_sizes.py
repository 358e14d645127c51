"""Sizes counted on networks without numbers, against closed forms and against what torch.save writes."""

import io
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lbstudy.methods import models, optimizers, sizes, smoothing
from lbstudy.methods.optimizers.kfac import KFAC, factor_numbers
from lbstudy.study.run import RunSpec

SHAPES = {"lenet5": (1, 28, 20), "vgg9": (1, 8, 8), "resnet18": (3, 32, 32)}

Layers = tuple[list[tuple[int, int]], list[int], int]


def layers(model: str, shape: models.Shape, classes: int) -> Layers:
    """By hand: inputs (the bias's 1 included) and outputs of each matrix, channels of batch norms, and biases."""
    channels, *sides = shape
    if model == "lenet5":
        features = 16 * math.prod(((side - 4) // 2 - 4) // 2 for side in sides)
        return [(25 * channels + 1, 6), (151, 16), (features + 1, 120), (121, 84), (85, classes)], [], 5
    if model == "vgg9":
        widths = [64, 64, 128, 128, 256, 256, 256]
        convolutions = [(9 * a + 1, b) for a, b in pairwise([channels, *widths])]
        features = 256 * math.prod(-(-side // 8) for side in sides)
        return [*convolutions, (features + 1, 256), (257, classes)], [*widths, 256], 9
    stages = [64, 128, 256, 512]  # ResNet-18: four convolutions each, and one on the short cut into all but the first
    matrices, batch_norms = [(9 * channels, 64)], [64]
    for before, width in zip([64, *stages], stages, strict=False):
        matrices += [(9 * before, width), *[(9 * width, width)] * 3]
        batch_norms += [width] * 4
        if before != width:
            matrices.append((before, width))
            batch_norms.append(width)
    return [*matrices, (513, classes)], batch_norms, 1


@pytest.mark.parametrize("model", ["lenet5", "vgg9", "resnet18"])
@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), ((1, 28, 20), 100)])
@pytest.mark.parametrize("element", [4, 8])
def test_counts_are_those_by_hand(model: str, shape: models.Shape, classes: int, element: int):
    network = models.check(model, shape, classes)
    matrices, norms, biases = layers(model, shape, classes)
    numbers = sum(inputs * outputs for inputs, outputs in matrices) + 4 * sum(norms)
    tensors = len(matrices) + biases + 5 * len(norms)
    expected = element * numbers + sizes.TENSOR_BYTES * (tensors - len(norms)) + 8 * len(norms)
    assert sizes.model_bytes(network, element) == expected
    factors = sum(n * (2 * n + 1) for matrix in matrices for n in matrix) + 6 * sum(norms)
    assert sum(factor_numbers(network)) == factors
    assert len(factor_numbers(network)) == 4 * len(matrices) + 2 * len(norms)


def saved(state: object) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return len(buffer.getvalue())


def snapshot_after_a_step(run: RunSpec, network: nn.Module, shape: models.Shape) -> dict[str, object]:
    optimizer = optimizers.build(run, network)
    images, labels = torch.randn(4, *shape), torch.arange(4)
    if isinstance(optimizer, KFAC):
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
def test_checkpoint_is_no_larger_than_planned_and_not_much_smaller(model: str, optimizer: str, kfac: dict[str, str]):
    shape = SHAPES[model]
    run = RunSpec.model_validate({
        "model": model, "dataset": {"name": "digits"}, "batch_size": 4, "optimizer": optimizer, "kfac": kfac,
        "hyper": {"learning_rate": 0.01, "momentum": 0.9}, "budget": {"epochs": 1},
    })  # fmt: skip
    network, planned = models.build(model, shape, 10), models.check(model, shape, 10)
    snapshot = snapshot_after_a_step(run, network, shape)
    assert (
        1
        <= sizes.checkpoint_bytes(planned, optimizers.get(run.optimizer).remembers(planned), 4) / saved(snapshot)
        < 1.1
    )
    assert 1 <= sizes.model_bytes(planned, 4) / saved(network.state_dict()) < 1.1


def test_a_checkpoint_with_averaged_weights_is_no_larger_than_planned():
    run = RunSpec.model_validate({
        "model": "lenet5", "dataset": {"name": "digits"}, "batch_size": 4, "optimizer": "sgd", "smoothing": "ema",
        "hyper": {"learning_rate": 0.01, "momentum": 0.9, "ema_decay": 0.9}, "budget": {"epochs": 1},
    })  # fmt: skip
    network, planned = models.build("lenet5", SHAPES["lenet5"], 10), models.check("lenet5", SHAPES["lenet5"], 10)
    smooth = smoothing.build(run, network)
    snapshot = snapshot_after_a_step(run, network, SHAPES["lenet5"])
    smooth.after_step(0)
    with smooth.averaged():
        kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    size = saved(snapshot | {"smoothing": smooth.state_dict(), "evaluated": kept})
    remembered = optimizers.get("sgd").remembers(planned)
    assert 1 <= sizes.checkpoint_bytes(planned, remembered, 4, averaged=smoothing.averages("ema")) / size < 1.1
    assert not smoothing.averages("mixup+noise")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:efficientnet_b0"])
def test_a_network_from_elsewhere_is_as_large_as_torch_saves_it(name: str):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    shape = (3, 64, 64)
    real = saved(models.build(name, shape, 10).state_dict())
    assert sizes.model_bytes(models.check(name, shape, 10), 4) == pytest.approx(real, rel=0.03)
