"""Parameter noise against closed forms."""

import math

import pytest
import torch
from torch import nn

from lbstudy.methods.smoothing import Draw
from lbstudy.methods.smoothing.noise import Numbers, ParameterNoise, Settings
from lbstudy.parallel.batch_norm import BatchNorm


def noise_on(model: nn.Module, magnitude: float, **spec: object) -> ParameterNoise:
    return ParameterNoise(model, Numbers(noise_magnitude=magnitude), Settings.model_validate(spec), seed=5)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestParameterNoise:
    def test_weights_are_restored_to_the_bit(self):
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))
        before = flat(model).clone()
        with noise_on(model, 0.1).perturbed(Draw(0)):
            assert (flat(model) - before).abs().max() > 0.05
        assert torch.equal(flat(model), before)

    def test_weights_are_restored_after_an_error(self):
        model = nn.Linear(3, 2)
        before = flat(model).clone()
        with pytest.raises(ZeroDivisionError), noise_on(model, 0.1).perturbed(Draw(0)):
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
            with noise.perturbed(Draw(step)):
                rises.append(loss() - clean)
        rise = torch.tensor(rises)
        expected = variance * a**2 / 2 * hessian.trace().item()
        standard_error = rise.std().item() / math.sqrt(len(rises))
        assert abs(rise.mean().item() - expected) < 4 * standard_error
        assert standard_error < 0.02 * expected

    def test_draws_are_a_function_of_step_ghost_batch_and_copy(self):
        noise = noise_on(nn.Linear(4, 3), 1.0)
        draws = {key: noise.noise(Draw(*key))[0] for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
        assert torch.equal(draws[0, 0, 0], noise.noise(Draw(0))[0])
        values = [tuple(d.flatten().tolist()) for d in draws.values()]
        assert len(set(values)) == 4

    def test_filter_noise_has_the_norm_of_its_filter(self):
        model = nn.Conv2d(3, 8, 3)
        weight, bias = noise_on(model, 0.5, scale="filter").noise(Draw(0))
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), 0.5 * model.weight.detach().flatten(1).norm(dim=1))
        torch.testing.assert_close(bias.abs(), 0.5 * model.bias.detach().abs(), rtol=1e-3, atol=1e-5)

    def test_weight_noise_is_relative_to_each_weight(self):
        model = nn.Linear(40, 30)
        ratio = noise_on(model, 0.5, scale="weight").noise(Draw(0))[0] / model.weight.detach()
        assert ratio.abs().max() <= 0.5
        assert ratio.abs().max() > 0.49

    def test_batch_norm_is_left_out_unless_asked_for(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4))
        assert len(noise_on(model, 1.0).noise(Draw(0))) == 2
        assert len(noise_on(model, 1.0, batch_norm=True).noise(Draw(0))) == 4

    def test_annealed_noise_shrinks(self):
        noise = noise_on(nn.Linear(40, 30), 0.2, schedule="annealed")
        assert noise.strength(0) == 0.2
        assert noise.strength(99) == pytest.approx(0.2 * 100**-0.275)
        assert noise.noise(Draw(99))[0].abs().max() <= noise.strength(99)

    def test_noise_that_stays_is_added_once(self):
        model = nn.Linear(4, 3)
        before, noise = flat(model).clone(), noise_on(model, 0.1, denoise=False)
        noise.after_step(3)
        torch.testing.assert_close(flat(model) - before, torch.cat([d.flatten() for d in noise.noise(Draw(3))]))
