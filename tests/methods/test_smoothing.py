"""Mixup and parameter noise against closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbstudy.methods.smoothing import Mixing, ParameterNoise, draw_mixing, mix, mixed_cross_entropy
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.study.run import MixupSpec, NoiseSpec

CPU = torch.device("cpu")


def mixing(step: int = 0, samples: int = 64, alpha: float = 0.4, per: str = "mini_batch") -> Mixing:
    return draw_mixing(MixupSpec(per=per), alpha, 7, step, samples, CPU, torch.float64)


class TestMixup:
    def test_loss_is_cross_entropy_with_soft_labels(self):
        logits = torch.randn(64, 10, dtype=torch.float64)
        labels = torch.randint(10, (64,))
        draw = mixing(per="sample")
        partners = labels[draw.partners]
        lam = draw.coefficients[:, None]
        soft = lam * F.one_hot(labels, 10) + (1 - lam) * F.one_hot(partners, 10)
        loss = mixed_cross_entropy(logits, labels, partners, draw.coefficients)
        torch.testing.assert_close(loss, F.cross_entropy(logits, soft, reduction="sum"))

    def test_images_are_interpolated(self):
        x, y = torch.rand(2, 64, 3, 4, 4, dtype=torch.float64)
        lam = torch.rand(64, dtype=torch.float64)
        for i, mixed in enumerate(mix(x, y, lam)):
            torch.testing.assert_close(mixed, lam[i] * x[i] + (1 - lam[i]) * y[i])

    def test_one_coefficient_per_minibatch_or_per_sample(self):
        assert len(mixing().coefficients.unique()) == 1
        assert len(mixing(per="sample").coefficients.unique()) == 64
        assert sorted(mixing().partners.tolist()) == list(range(64))

    def test_draws_are_a_function_of_the_step(self):
        assert torch.equal(mixing(3).partners, mixing(3).partners)
        assert not torch.equal(mixing(3).partners, mixing(4).partners)

    def test_coefficients_follow_the_beta_distribution_unfolded(self):
        alpha = 0.4
        draws = torch.stack([mixing(step, samples=1, alpha=alpha).coefficients[0] for step in range(4000)])
        assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
        assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
        assert (draws < 0.5).double().mean().item() == pytest.approx(0.5, abs=0.03)  # not folded to [1/2, 1]


def noise_on(model: nn.Module, magnitude: float, **spec: object) -> ParameterNoise:
    return ParameterNoise(model, NoiseSpec.model_validate(spec), magnitude, seed=5)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestParameterNoise:
    def test_weights_are_restored_to_the_bit(self):
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))
        before = flat(model).clone()
        with noise_on(model, 0.1).perturbed(0):
            assert (flat(model) - before).abs().max() > 0.05
        assert torch.equal(flat(model), before)

    def test_weights_are_restored_after_an_error(self):
        model = nn.Linear(3, 2)
        before = flat(model).clone()
        with pytest.raises(ZeroDivisionError), noise_on(model, 0.1).perturbed(0):
            raise ZeroDivisionError
        assert torch.equal(flat(model), before)

    @pytest.mark.parametrize(("distribution", "variance"), [("uniform", 1 / 3), ("gaussian", 1.0)])
    def test_mean_rise_of_a_quadratic_loss(self, distribution: str, variance: float):
        """E[L(w + u)] - L(w) = variance a^2 / 2 tr H, which is a^2 / 6 tr H for uniform noise of magnitude a."""
        a, size = 0.3, 50
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        hessian = root @ root.T / size
        weights = nn.Module()
        weights.w = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

        def loss() -> float:
            return (0.5 * weights.w @ hessian @ weights.w).item()

        noise, clean, rises = noise_on(weights, a, distribution=distribution), loss(), []
        for step in range(20_000):
            with noise.perturbed(step):
                rises.append(loss() - clean)
        rise = torch.tensor(rises)
        expected = variance * a**2 / 2 * hessian.trace().item()
        standard_error = rise.std().item() / math.sqrt(len(rises))
        assert abs(rise.mean().item() - expected) < 4 * standard_error
        assert standard_error < 0.02 * expected

    def test_draws_are_a_function_of_step_ghost_batch_and_copy(self):
        noise = noise_on(nn.Linear(4, 3), 1.0)
        draws = {key: noise.draw(*key)[0] for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
        assert torch.equal(draws[0, 0, 0], noise.draw(0)[0])
        values = [tuple(d.flatten().tolist()) for d in draws.values()]
        assert len(set(values)) == 4

    def test_filter_noise_has_the_norm_of_its_filter(self):
        model = nn.Conv2d(3, 8, 3)
        weight, bias = noise_on(model, 0.5, scale="filter").draw(0)
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), 0.5 * model.weight.detach().flatten(1).norm(dim=1))
        torch.testing.assert_close(bias.abs(), 0.5 * model.bias.detach().abs(), rtol=1e-3, atol=1e-5)

    def test_weight_noise_is_relative_to_each_weight(self):
        model = nn.Linear(40, 30)
        ratio = noise_on(model, 0.5, scale="weight").draw(0)[0] / model.weight.detach()
        assert ratio.abs().max() <= 0.5
        assert ratio.abs().max() > 0.49

    def test_batch_norm_is_left_out_unless_asked_for(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4))
        assert len(noise_on(model, 1.0).draw(0)) == 2
        assert len(noise_on(model, 1.0, batch_norm=True).draw(0)) == 4

    def test_annealed_noise_shrinks(self):
        noise = noise_on(nn.Linear(40, 30), 0.2, schedule="annealed")
        assert noise.strength(0) == 0.2
        assert noise.strength(99) == pytest.approx(0.2 * 100**-0.275)
        assert noise.draw(99)[0].abs().max() <= noise.strength(99)

    def test_noise_that_stays_is_added_once(self):
        model = nn.Linear(4, 3)
        before, noise = flat(model).clone(), noise_on(model, 0.1, denoise=False)
        noise.add(3)
        torch.testing.assert_close(flat(model) - before, torch.cat([d.flatten() for d in noise.draw(3)]))
