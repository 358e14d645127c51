"""Networks and their batch norm."""

import pytest
import torch
from torch import nn

from lbstudy.methods import models
from lbstudy.parallel.batch_norm import BatchNorm, renewed_statistics
from lbstudy.parallel.workers import Workers

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(("name", "parameters"), [("lenet5", 62_006), ("vgg9", 2_789_706)])
def test_parameter_counts_are_the_published_ones(name: str, parameters: int):
    model = models.build(name, CIFAR, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vgg9_is_built_as_in_loss_landscape():
    model = models.build("vgg9", CIFAR, 10)
    assert len(list(model.parameters())) == 34
    assert len(model.state_dict()) == 58
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 2_785_472
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear[0].weight.std().item() == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("name", ["lenet5", "vgg9", "resnet18"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_outputs_have_a_logit_per_class(name: str, shape: tuple[int, int, int]):
    assert models.build(name, shape, 7)(torch.rand(4, *shape)).shape == (4, 7)


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
