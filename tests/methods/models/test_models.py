"""The built-in networks: what the papers say of them, and initial weights that must not change."""

import hashlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods import models
from lbstudy.methods.models import cifar_resnet

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def digest(state: dict[str, Tensor]) -> str:
    """Of names, shapes and every bit of a state."""
    found = hashlib.sha256()
    for key, value in state.items():
        found.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


GOLDEN = [
    ("lenet5", CIFAR, "8e4ff57f8f8a7665", 0.8505880236625671),
    ("lenet5", MNIST, "06d4614ccf6cb243", 0.023935139179229736),
    ("vgg9", CIFAR, "3937b623b5035a63", 0.7563503980636597),
    ("vgg9", MNIST, "1817bc98f6c831ff", 0.4502745270729065),
    ("resnet18", CIFAR, "db241d085c099029", 0.4258660078048706),
    ("resnet18", MNIST, "d6b53c1949abf661", 0.07292592525482178),
]


@pytest.mark.parametrize(("name", "shape", "state", "next_draw"), GOLDEN)
@pytest.mark.parametrize("ghost", [None, 8])
def test_initial_weights_and_names_are_those_of_version_0_1(
    name: str, shape: models.Shape, state: str, next_draw: float, ghost: int | None
):
    torch.manual_seed(0)
    assert digest(models.build(name, shape, 10, ghost).state_dict()) == state
    assert torch.rand(1).item() == next_draw  # and the generator is where it was after them


def test_each_file_is_a_model_that_says_what_it_is():
    assert models.names() == ["lenet5", "resnet18", "resnet44", "resnet8", "vgg9"]
    labels = [models.find(name).label for name in models.names()]
    assert labels == ["LeNet-5", "ResNet-18", "ResNet-44", "ResNet-8", "VGG9"]
    assert all(models.find(name).source for name in models.names())


COUNTS = [
    ("lenet5", 62_006), ("vgg9", 2_789_706), ("resnet18", 11_173_962),
    ("resnet8", 75_290), ("resnet20", 269_722), ("resnet44", 658_586),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), COUNTS)
def test_parameter_counts_are_the_published_ones(name: str, expected: int):
    assert parameters(models.build(name, CIFAR, 10)) == expected


def test_vgg9_is_built_as_in_loss_landscape():
    model = models.build("vgg9", CIFAR, 10)
    assert len(list(model.parameters())) == 34
    assert len(model.state_dict()) == 58
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 2_785_472
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear[0].weight.std().item() == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("name", ["lenet5", "vgg9", "resnet18", "resnet8"])
@pytest.mark.parametrize("shape", [CIFAR, MNIST])
def test_outputs_have_a_logit_per_class(name: str, shape: models.Shape):
    assert models.build(name, shape, 7)(torch.rand(4, *shape)).shape == (4, 7)


# He et al. 2016, table 6: millions of parameters
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_as_many_parameters_as_in_the_paper(depth: int, millions: float):
    with torch.device("meta"):
        network = models.build(f"resnet{depth}", CIFAR, 10)
    digits = 1 if depth == 110 else 2
    assert round(parameters(network) / 1e6, digits) == millions
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_cifar_resnet_has_the_papers_stages():
    network, seen = models.build("resnet20", CIFAR, 10), []
    for stage in network.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape[1:])))
    network(torch.rand(2, *CIFAR))
    assert seen == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [len(stage) for stage in network.stages] == [3, 3, 3]


def test_shortcut_takes_every_second_pixel_and_fills_up_with_zeros():
    block = cifar_resnet.Block(16, 32).eval()
    nn.init.zeros_(block.bn2.weight)  # the residual is then 0
    images = torch.rand(2, 16, 9, 8)
    out = block(images)
    assert out.shape == (2, 32, 5, 4)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_a_block_is_the_papers_equation():
    block = cifar_resnet.Block(4, 4).double().train()
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    inner = F.conv2d(x, block.conv1.weight, padding=1)
    inner = F.batch_norm(inner, None, None, training=True).relu()
    outer = F.batch_norm(F.conv2d(inner, block.conv2.weight, padding=1), None, None, training=True)
    torch.testing.assert_close(block(x), (outer + x).relu())


REFUSED = [
    ("lenet6", r"there is no model 'lenet6'; did you mean lenet5.*; or resnet.*torchvision:NAME"),
    ("resnet9", r"resnet9: the CIFAR ResNets have 6n \+ 2 layers \(resnet8, resnet14"),
    ("resnet2", r"6n \+ 2 layers \(resnet8, resnet14"),
    ("resnet50", r"resnet50 could be .* take resnet44 or resnet56, the second is `torchvision:resnet50`"),
    ("stem", r"there is no model 'stem'"),
    ("", r"there is no model ''"),
    (":f", r"there is no model ':f'"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_unknown_models_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        models.find(name)


def test_a_setting_that_a_model_has_not_is_refused():
    with pytest.raises(ValueError, match="lenet5 has no setting `width`, but got 3; it takes none"):
        models.build("lenet5", CIFAR, 10, settings={"width": 3})


@pytest.mark.parametrize("name", models.names())
def test_check_takes_what_works_and_touches_no_random_number(name: str):
    torch.manual_seed(3)
    network = models.check(name, CIFAR, 10)
    assert next(network.parameters()).is_meta
    assert network.training
    expected = torch.Generator().manual_seed(3)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


@pytest.mark.parametrize(("side", "works"), [(16, True), (15, False), (8, False)])
def test_images_too_small_for_a_model_are_refused(side: int, works: bool):
    shape = (3, side, side)
    if works:
        models.check("lenet5", shape, 10)
    else:
        with pytest.raises(ValueError, match=rf"lenet5 cannot be built for images of 3x{side}x{side} .*size"):
            models.check("lenet5", shape, 10)


ALONE = [
    ("lenet5", CIFAR, False), ("vgg9", CIFAR, True), ("resnet18", CIFAR, False), ("resnet18", (3, 8, 8), True),
    ("resnet18", (3, 9, 9), False), ("resnet8", CIFAR, False), ("resnet8", (3, 4, 4), True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "alone"), ALONE)
def test_where_a_single_sample_has_no_variance(name: str, shape: models.Shape, alone: bool):
    network = models.build(name, shape, 10)
    assert models.normalises_vectors(network, shape) is alone
    images = torch.rand(1, *shape)
    if alone:  # indeed
        with pytest.raises(ValueError, match="at least two values"):
            network(images)
    else:
        network(images)
