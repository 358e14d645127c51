"""Networks and their batch norm."""

import pytest
import torch
from torch import nn

from lbstudy import models
from lbstudy.batch_norm import BatchNorm, commit_statistics
from lbstudy.workers import Workers

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
            commit_statistics(ours, Workers())
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_ghosts_are_normalised_by_themselves(self, shape: tuple[int, ...]):
        ours, theirs = BatchNorm(5, ghost=4).double(), self.reference(shape)
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), torch.cat([theirs(part) for part in x.split(4)]))
        commit_statistics(ours, Workers())
        means = torch.stack([part.transpose(0, 1).flatten(1).mean(1) for part in x.split(4)])
        torch.testing.assert_close(ours.running_mean, 0.1 * means.mean(0))

    def test_statistics_change_once_a_step(self, shape: tuple[int, ...]):
        whole, parts = BatchNorm(5, ghost=4).double(), BatchNorm(5, ghost=4).double()
        x = torch.randn(shape, dtype=torch.float64)
        whole(x)
        for part in x.split(4):
            parts(part)
        for layer in (whole, parts):
            assert layer.running_mean.abs().sum() == 0
            commit_statistics(layer, Workers())
        torch.testing.assert_close(whole.state_dict(), parts.state_dict())


def test_a_single_value_per_channel_is_finite():
    layer = BatchNorm(3)
    out = layer(torch.randn(1, 3))
    commit_statistics(layer, Workers())
    assert out.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_an_empty_slice_gives_zero_gradients():
    layer = BatchNorm(3, ghost=2)
    layer(torch.randn(0, 3, requires_grad=True)).sum().backward()
    assert layer.weight.grad.tolist() == [0, 0, 0]
