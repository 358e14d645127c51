"""Batch norm of ours against torch's, and torch's in networks from anywhere made ours."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lbstudy.methods import models
from lbstudy.methods.models.batch_norms import with_our_batch_norm
from lbstudy.methods.optimizers.kfac import KFAC
from lbstudy.parallel.batch_norm import BatchNorm, renewed_statistics
from lbstudy.parallel.workers import Workers


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4, 4)])
class TestBatchNorm:
    """Held against torch's own batch norm."""

    def reference(self, shape: tuple[int, ...]) -> nn.Module:
        return (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()

    def test_sync_is_torchs(self, shape: tuple[int, ...]):
        ours, theirs = BatchNorm(5).double(), self.reference(shape)
        for _ in range(3):
            x = torch.randn(shape, dtype=torch.float64) * 3 + 1
            torch.testing.assert_close(ours(x), theirs(x))
        assert ours.running_mean.abs().sum() == 0  # training leaves them alone

    def test_renewed_statistics_are_those_of_the_block_alone(self, shape: tuple[int, ...]):
        ours, theirs = nn.Sequential(BatchNorm(5)).double(), nn.Sequential(self.reference(shape))
        for module in (ours, theirs):
            module[0].running_mean.fill_(7)
        batches = [torch.randn(shape, dtype=torch.float64) * 3 + shift for shift in range(4)]
        with torch.no_grad(), renewed_statistics(ours, Workers()):
            for x in batches:
                ours(x)
        torch.optim.swa_utils.update_bn(batches, theirs)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(ours.state_dict()[f"0.{name}"], theirs.state_dict()[f"0.{name}"])
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_ghosts_are_normalised_by_themselves(self, shape: tuple[int, ...]):
        ours, theirs = BatchNorm(5, ghost=4).double(), self.reference(shape)
        x = torch.randn(shape, dtype=torch.float64)
        with renewed_statistics(ours, Workers()):
            torch.testing.assert_close(ours(x), torch.cat([theirs(part) for part in x.split(4)]))
        means = torch.stack([part.transpose(0, 1).flatten(1).mean(1) for part in x.split(4)])
        torch.testing.assert_close(ours.running_mean, means.mean(0))

    def test_batches_weigh_by_their_size(self, shape: tuple[int, ...]):
        layer = BatchNorm(5, ghost=8).double()  # 8 and 4
        x = torch.randn(shape, dtype=torch.float64)
        with renewed_statistics(layer, Workers()):
            layer(x)
        torch.testing.assert_close(layer.running_mean, x.transpose(0, 1).flatten(1).mean(1))
        variances = [part.transpose(0, 1).flatten(1).var(1) for part in x.split(8)]
        torch.testing.assert_close(layer.running_var, (2 * variances[0] + variances[1]) / 3)


def test_a_single_value_per_channel_is_refused_as_torch_does():
    for x, ghost in ((torch.randn(1, 3), None), (torch.randn(5, 3), 2)):
        with pytest.raises(ValueError, match="at least two values per channel"):
            BatchNorm(3, ghost)(x)
    assert BatchNorm(3)(torch.randn(1, 3, 2, 2)).isfinite().all()


def test_an_empty_slice_gives_zero_gradients():
    layer = BatchNorm(3, ghost=2)
    layer(torch.randn(0, 3, requires_grad=True)).sum().backward()
    assert layer.weight.grad.tolist() == [0, 0, 0]


def test_layers_without_weight_or_bias_are_torchs():
    for theirs in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, bias=False)):
        network = nn.Sequential(copy.deepcopy(theirs))
        ours = with_our_batch_norm(network, None).double()
        x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
        with renewed_statistics(ours, Workers()):
            torch.testing.assert_close(ours(x), theirs.double()(x))
        torch.optim.swa_utils.update_bn([x], nn.Sequential(theirs))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        assert not ours[0].ghost
        assert not KFAC(nn.Sequential(ours, nn.Linear(2, 2)), lr=0.1)._blocks[1:]  # the linear layer alone
        ours.train()(torch.randn(0, 3, 2, 2, dtype=torch.float64))


def test_a_layer_keeps_what_it_was():
    theirs = nn.BatchNorm2d(3, eps=0.5, momentum=0.01)
    nn.init.uniform_(theirs.weight)
    theirs.bias.requires_grad_(False)
    network = nn.ModuleDict({"a": theirs, "again": theirs, "b": nn.BatchNorm1d(2)})
    names = list(network.state_dict())
    ours = with_our_batch_norm(network, 4)
    assert list(ours.state_dict()) == names
    assert isinstance(ours["a"], BatchNorm)
    assert ours["a"] is ours["again"]
    assert ours["a"].weight is theirs.weight
    assert ours["a"].running_mean is theirs.running_mean
    assert (ours["a"].eps, ours["a"].momentum, ours["a"].ghost) == (0.5, 0.01, 4)
    assert not ours["a"].bias.requires_grad
    assert with_our_batch_norm(ours, 8)["b"].ghost == 8  # ours are made anew
    assert isinstance(with_our_batch_norm(nn.BatchNorm1d(3), None), BatchNorm)
    assert isinstance(with_our_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)), None)[0], BatchNorm)


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnCheck(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None: ...


def test_batch_norm_that_computes_something_else_is_refused():
    with pytest.raises(ValueError, match="batch norm 0 is a .*OwnForward, whose forward pass is its own"):
        with_our_batch_norm(nn.Sequential(OwnForward(3)), None)
    with pytest.raises(ValueError, match="batch norm 0 has track_running_stats=False"):
        with_our_batch_norm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), None)
    assert isinstance(with_our_batch_norm(nn.Sequential(OwnCheck(3)), None)[0], BatchNorm)


def timms(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=5)


ORIGINALS = {
    "torchvision:shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "torchvision:mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5, dropout=0.0),
    "timm:resnet10t": lambda: timms("resnet10t"),
    "timm:efficientnet_b0": lambda: timms("efficientnet_b0"),  # BatchNormAct2d
    "timm:mobilenetv3_small_050": lambda: timms("mobilenetv3_small_050"),
    "timm:densenet121": lambda: timms("densenet121"),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_networks_from_elsewhere_compute_what_they_did(name: str):
    """Outputs, gradients and evaluation against torch's own batch norm; with ghosts against one ghost at a time."""
    torch.manual_seed(0)
    theirs = ORIGINALS[name]().double()
    ours = with_our_batch_norm(copy.deepcopy(theirs), None)
    layers = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert layers
    assert all(type(m) is BatchNorm for m in layers)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    out, expected = ours.train()(images), theirs.train()(images)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-7)
    for layer in layers:
        layer.ghost = 3
    with torch.no_grad():
        torch.testing.assert_close(ours(images), torch.cat([theirs(part) for part in images.split(3)]))
        with renewed_statistics(ours, Workers()):
            ours(images[:3])
        torch.optim.swa_utils.update_bn([images[:3]], theirs)
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_kfac_sees_the_gradient_at_the_norm_and_not_behind_the_activation():
    timm = pytest.importorskip("timm")
    network = nn.Sequential(timm.layers.BatchNormAct2d(3), nn.Flatten(), nn.Linear(48, 2))
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    plain[3].load_state_dict(network[2].state_dict())
    images, fishers = torch.randn(8, 3, 4, 4), []
    for model in (with_our_batch_norm(network, None), with_our_batch_norm(plain, None)):
        optimizer = KFAC(model, lr=0.1)
        with optimizer.capture(8):
            nn.functional.cross_entropy(model(images), torch.arange(8) % 2).backward()
        optimizer.step()
        fishers.append(optimizer.state[next(model.parameters())]["fisher"])
    assert fishers[0].abs().sum() > 0
    torch.testing.assert_close(*fishers)


def test_ghost_batches_of_rows_that_are_no_samples_are_refused():
    pytest.importorskip("timm")
    levit, shape = "timm:levit_128s", (3, 224, 224)
    models.check(levit, shape, 10)
    with pytest.raises(ValueError, match="normalises 392 rows for 2 images in its batch norm stages.*qkv.bn, so that"):
        models.check(levit, shape, 10, ghost=2)
    models.check("timm:efficientnet_b0", (3, 64, 64), 10, ghost=2)


@pytest.mark.slow
def test_every_network_of_torchvision_and_of_timms_families_works():
    import timm

    names = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    for family in timm.list_modules():
        names += [f"timm:{name}" for name in sorted(timm.list_models(module=family), key=len)[:1]]
    failed = {}
    for name in names:
        try:
            with torch.device("meta"):
                network = models.build(name, (3, 224, 224), 10, ghost=2)
        except ValueError as error:
            if "meta tensor" not in str(error):  # RegNets look at numbers; `check` has the CPU for such
                failed[name] = str(error)
            continue
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(type(m) is BatchNorm for m in norms), name
    assert not failed
