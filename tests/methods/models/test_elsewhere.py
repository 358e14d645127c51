"""Models from elsewhere: torchvision's, timm's, and functions of one's own."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from lbstudy.methods import models
from lbstudy.parallel.batch_norm import BatchNorm

CIFAR = (3, 32, 32)
SMALL = {"stem": "small"}

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of the user's; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"mine_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


LINEAR = "nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))"


class TestTorchvision:
    def test_the_network_is_torchvisions(self):
        torch.manual_seed(0)
        theirs = torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.1)
        torch.manual_seed(0)
        ours = models.build("torchvision:mobilenet_v3_small", CIFAR, 10, settings={"dropout": 0.1})
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))

    def test_small_stem_makes_the_built_in_resnet18(self):
        torch.manual_seed(0)
        built_in = models.build("resnet18", CIFAR, 10).state_dict()
        torch.manual_seed(0)
        same = models.build("torchvision:resnet18", CIFAR, 10, settings=SMALL).state_dict()
        assert list(same) == list(built_in)
        assert all(torch.equal(same[key], value) for key, value in built_in.items())

    @pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "squeezenet1_1", "mobilenet_v3_small"])
    def test_channels_are_those_of_the_images(self, name: str):
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name, num_classes=10)
        ours = models.check(f"torchvision:{name}", (1, 64, 64), 10)
        first, other = (next(m for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (ours, theirs))
        assert first.in_channels == 1
        for key in ("out_channels", "kernel_size", "stride", "padding"):
            assert getattr(first, key) == getattr(other, key)
        count = sum(p.numel() for p in ours.parameters())
        assert count == sum(p.numel() for p in theirs.parameters()) - other.weight.numel() * 2 // 3

    # (the first convolution, the max-poolings that are left)
    STEMS = [
        ("resnet50", "conv1", 0), ("densenet121", "features.conv0", 0), ("squeezenet1_1", "features.0", 2),
        ("mobilenet_v3_small", "features.0.0", 0), ("vgg16", "features.0", 5), ("alexnet", "features.0", 2),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "first", "pools"), STEMS)
    def test_small_stem_keeps_the_resolution(self, name: str, first: str, pools: int):
        network = models.check(f"torchvision:{name}", CIFAR, 10, SMALL)
        convolution = network.get_submodule(first)
        assert isinstance(convolution, nn.Conv2d)
        assert (convolution.kernel_size, convolution.stride, convolution.padding) == ((3, 3), (1, 1), (1, 1))
        assert sum(isinstance(m, nn.MaxPool2d) for m in network.modules()) == pools
        seen = []
        following = [m for m in network.modules() if isinstance(m, nn.Conv2d)][1]
        following.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[-1]))
        network(torch.rand(2, *CIFAR, device="meta"))
        assert seen == [32]

    REFUSED = [
        ("torchvision:resnet", {}, "there is no classification network 'resnet' in torchvision; did you mean "),
        ("torchvision:fcn_resnet50", {}, "there is no classification network 'fcn_resnet50' in torchvision"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "`weights` asks for trained weights, but a study starts from"),
        ("torchvision:resnet18", {"stem": "tiny"}, "`stem` must be `small` or left out, but got 'tiny'"),
        ("torchvision:resnet18", {"depth": 3}, "classes, depth=3: .*unexpected keyword argument 'depth'"),
        ("torchvision:googlenet", {}, r"gives a GoogLeNetOutputs, but must give a tensor of N x classes = \(2, 10\)"),
        ("torchvision:alexnet", {}, "alexnet does not work with images of 3x32x32: .*too small"),
        ("torchvision:vit_b_16", {}, "does not work with images of 3x32x32: Wrong image height! Expected 224"),
    ]

    @pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
    def test_refused(self, name: str, settings: dict[str, object], message: str):
        with pytest.raises(ValueError, match=message):
            models.check(name, CIFAR, 10, settings)


class TestTimm:
    def test_missing_timm_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch):
        for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_NoTimm(), *sys.meta_path])
        with pytest.raises(ValueError, match="^timm:resnet18 needs timm: pip install timm$"):
            models.find("timm:resnet18")

    @pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002"])
    def test_gray_images_and_settings(self, name: str):
        pytest.importorskip("timm")
        network = models.check(f"timm:{name}", (1, 64, 64), 7, {"drop_rate": 0.25})
        assert any(isinstance(m, BatchNorm) for m in network.modules())
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == 1

    @pytest.mark.parametrize("name", ["resnet18", "resnet26d", "efficientnet_b0"])  # 26d: a stem of three convolutions
    def test_small_stem(self, name: str):
        pytest.importorskip("timm")
        network = models.check(f"timm:{name}", (1, 32, 32), 7, SMALL)
        stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        assert (stem.in_channels, stem.kernel_size, stem.stride) == (1, (3, 3), (1, 1))
        block = network.layer1 if hasattr(network, "layer1") else network.blocks[0]
        block.register_forward_pre_hook(lambda _module, inputs: sides.append(inputs[0].shape[-1]))
        sides: list[int] = []
        network(torch.rand(2, 1, 32, 32, device="meta"))
        assert sides == [32]

    REFUSED = [
        ("timm:resnt18", {}, "there is no network 'resnt18' in timm; did you mean resnet18"),
        ("timm:resnet18.a1_in1k", {}, "there is no network 'resnet18.a1_in1k' in timm; did you mean resnet18"),
        ("timm:resnet18", {"pretrained": True}, "`pretrained` asks for trained weights"),
        ("timm:resnet18", {"nonsense": 1}, "nonsense=1: .*unexpected keyword argument 'nonsense'"),
        ("timm:tf_efficientnet_b0", SMALL, r"its first convolution, conv_stem, is a Conv2dSame"),
        ("timm:vit_tiny_patch16_224", {}, "does not work with images of 3x32x32: Input height"),
    ]

    @pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
    def test_refused(self, name: str, settings: dict[str, object], message: str):
        pytest.importorskip("timm")
        with pytest.raises(ValueError, match=message):
            models.check(name, CIFAR, 10, settings)

    def test_a_transformer_for_small_images(self):
        pytest.importorskip("timm")
        models.check("timm:vit_tiny_patch16_224", CIFAR, 10, {"img_size": 32, "patch_size": 4})


class _NoTimm:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")


class TestOnesOwn:
    def test_a_function_with_settings(self, write: Write):
        name = write(
            "def small(shape, classes, width=8):\n"
            "    return nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.BatchNorm2d(width), nn.Flatten(),\n"
            "                         nn.LazyLinear(classes) if not width else nn.Linear(width * 900, classes))\n"
        )
        network = models.build(f"{name}:small", CIFAR, 10, ghost=4, settings={"width": 3})
        assert isinstance(network[1], BatchNorm)
        assert (network[1].ghost, network[1].num_features) == (4, 3)
        assert models.find(f"{name}:small").label == "small"
        assert next(models.check(f"{name}:small", CIFAR, 10).parameters()).is_meta
        with pytest.raises(ValueError, match="has no setting `depth`, but got 2; it takes width"):
            models.build(f"{name}:small", CIFAR, 10, settings={"depth": 2})

    def test_a_model_with_a_label(self, write: Write):
        name = write(
            "from lbstudy.methods.models import Model\n"
            f"MODEL = Model(label='Mine', source='me', build=lambda shape, classes: {LINEAR})\n"
        )
        assert models.find(f"{name}:MODEL").label == "Mine"
        models.check(f"{name}:MODEL", CIFAR, 10)

    def test_a_function_that_looks_at_numbers_is_checked_on_the_cpu(self, write: Write):
        name = write(
            f"def f(shape, classes):\n    net = {LINEAR}\n    assert net[1].weight.abs().max().item() > 0\n    return net"
        )
        assert not next(models.check(f"{name}:f", CIFAR, 10).parameters()).is_meta

    def test_an_exception_while_importing_is_the_cause(self, write: Write):
        name = write("1 / 0\n")
        with pytest.raises(ValueError, match=rf"module {name} cannot be imported: ZeroDivisionError") as caught:
            models.find(f"{name}:f")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_a_module_that_is_not_there(self):
        with pytest.raises(ValueError, match="there is no module no_such_module"):
            models.find("no_such_module:f")

    WRONG = [
        ("network", "def netwerk(shape, classes): ...", "there is no attribute 'network' in .*; did you mean netwerk"),
        ("f", "f = 3", "f is a int, not a function"),
        ("f", "def f(): ...", r"f must take \(shape, classes\) and settings by name after these, but takes \(\)"),
        ("f", "def f(shape): ...", r"but takes \(shape\)"),
        ("f", "def f(shape, *, classes): ...", r"but takes \(shape, classes\)"),
        ("f", "def f(shape, classes, width): ...", "f needs the setting `width`"),
        ("f", "def f(shape, classes, weights, width): ...", "f needs the settings `weights`, `width`"),
        ("f", "def f(shape, classes): ...", "must be an nn.Module, but is a NoneType"),
        ("f", "def f(shape, classes): return nn.Flatten()", "it has no parameters"),
        ("f", "def f(shape, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))", "it has lazy layers"),
        ("f", "def f(shape, classes): raise RuntimeError('no\\nway')", "cannot be built for images of 3x32x32 and 10 classes: no way"),
        ("f", "def f(shape, classes): return nn.Linear(32, classes)", r"gives outputs of shape \(2, 3, 32, 10\), but must give N x classes = \(2, 10\)"),
        ("f", f"def f(shape, classes): classes += 1; return {LINEAR}", r"gives outputs of shape \(2, 11\)"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("function", "text", "message"), WRONG)
    def test_wrong_functions(self, write: Write, function: str, text: str, message: str):
        with pytest.raises(ValueError, match=message):
            models.check(f"{write(text)}:{function}", CIFAR, 10)

    def test_statistics_of_ones_own_are_refused(self, write: Write):
        name = write(
            "class Own(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.register_buffer('mean', torch.zeros(()))\n"
            "    def forward(self, x):\n"
            "        if self.training:\n"
            "            self.mean.lerp_(x.mean(), 0.1)\n"
            "        return x - self.mean\n"
            f"def f(shape, classes):\n    return nn.Sequential(Own(), *{LINEAR})\n"
        )
        message = "changes 0.mean while it is trained; every worker would have its own"
        with pytest.raises(ValueError, match=message):
            models.check(f"{name}:f", CIFAR, 10)
