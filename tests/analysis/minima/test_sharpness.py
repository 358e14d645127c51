"""Sharpness of functions whose maxima are known in closed form, and of networks."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lbstudy.analysis.minima.keskar import keskar, random_subspace
from lbstudy.analysis.minima.objective import Objective
from lbstudy.analysis.minima.sharpness import Sharpness, SharpnessSpec, average_rise, measure, worst_rise
from lbstudy.analysis.rules import OldRule
from lbstudy.methods import models
from lbstudy.parallel.randomness import stream
from lbstudy.training.data import ImageData
from lbstudy.training.train import evaluate, fingerprint
from tests.training.test_train import digits

N = 60
CURVATURE = np.linspace(0.1, 30, N)
Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def quadratic(hessian: np.ndarray, minimum: np.ndarray, slope: np.ndarray | float = 0.0) -> Loss:
    """0.25 + slope . d + d H d / 2, with d the distance from the minimum."""

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        d = x - minimum
        return 0.25 + float((slope * d).sum() + d @ hessian @ d / 2), slope + hessian @ d

    return loss


def rotated(seed: int = 3) -> np.ndarray:
    q = np.linalg.qr(draw(seed).standard_normal((N, N)))[0]
    return (q * CURVATURE) @ q.T


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_keskar_of_a_quadratic(epsilon: float, slope: float):
    x = draw(1).standard_normal(N)
    found = keskar(quadratic(np.diag(CURVATURE), x, slope), x, epsilon, draw())
    half = epsilon * (np.abs(x) + 1)
    exact = 100 * (slope * half.sum() + (CURVATURE * half**2).sum() / 2) / 1.25
    assert found.best == pytest.approx(exact, rel=0.01)
    if slope:
        assert found.published == pytest.approx(exact, rel=0.01)
    else:
        assert found.published == 0  # no gradient at the minimum: the published search does not move


def test_keskar_of_a_rotated_quadratic_is_about_the_best_of_many_corners():
    x, hessian = draw(1).standard_normal(N), rotated()
    half = 1e-3 * (np.abs(x) + 1)
    corners = half * draw(2).choice([-1, 1], size=(5000, N))
    best_corner = 100 * np.einsum("ij,jk,ik->i", corners, hessian, corners).max() / 2 / 1.25
    bound = 100 * (half**2).sum() * CURVATURE.max() / 2 / 1.25
    assert 0.97 * best_corner < keskar(quadratic(hessian, x), x, 1e-3, draw()).best <= bound


def test_keskar_in_a_subspace():
    x, hessian = draw(1).standard_normal(N), rotated()
    directions = random_subspace(N, 6, draw(9))
    a = directions.astype(float)
    half = 1e-3 * (np.abs(np.linalg.pinv(a) @ x) + 1)
    for slope in (0.0, draw(4).standard_normal(N)):
        values = [  # the maximum of a convex function over a box lies at a corner
            (slope * (a @ y)).sum() + (a @ y) @ hessian @ (a @ y) / 2
            for y in half * np.array(list(itertools.product([-1, 1], repeat=6)))
        ]
        found = keskar(quadratic(hessian, x, slope), x, 1e-3, draw(), directions)
        exact = 100 * max(values) / 1.25
        if np.any(slope):
            assert found.best == pytest.approx(exact, rel=0.01)
        else:  # exactly at the minimum many corners are local maxima: a lower bound, not far off
            assert 0.8 * exact < found.best < 1.0001 * exact
            assert found.published == 0


@pytest.mark.parametrize("dimension", [4, 100])
def test_a_corner_of_a_subspaces_box_is_as_far_away_as_one_of_the_full_box(dimension: int):
    """Root mean squares over weights at random corners: eps in either, however many directions there are."""
    size = 20_000
    subspace = random_subspace(size, dimension, draw())
    assert subspace.shape == (size, dimension)
    assert subspace.std() == pytest.approx(dimension**-0.5, rel=0.01)
    corners = 1e-3 * draw(1).choice([-1.0, 1.0], size=(dimension, 20))
    moves = subspace @ corners
    assert np.sqrt(np.mean(moves**2)) == pytest.approx(1e-3, rel=0.05)


def test_a_slope_rises_less_in_a_subspace_as_its_dimension_says():
    """f = g . d: the full box gives eps |g|_1, a subspace eps |A^T g|_1, sqrt(n / p) times less on average."""
    size, dimension = 10_000, 100
    slope = draw(2).standard_normal(size)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        return 1 + slope @ x, slope

    full = keskar(loss, np.zeros(size), 1e-3, draw()).published
    draws = [
        keskar(loss, np.zeros(size), 1e-3, draw(), random_subspace(size, dimension, draw(index))).published
        for index in range(5)
    ]
    assert full == pytest.approx(100 * 1e-3 * np.abs(slope).sum() / 2, rel=1e-6)
    assert full / np.mean(draws) == pytest.approx(np.sqrt(size / dimension), rel=0.1)


def test_keskar_uses_what_is_known_at_x():
    calls, loss = [], quadratic(rotated(), np.zeros(N), 1.0)

    def counted(x: np.ndarray) -> tuple[float, np.ndarray]:
        calls.append(x)
        return loss(x)

    found = keskar(counted, np.zeros(N), 1e-3, draw(), at_x=loss(np.zeros(N)))
    assert all(x.any() for x in calls)
    assert len(calls) <= 10 + 2 * 5  # ten iterations, two climbs
    assert found == keskar(loss, np.zeros(N), 1e-3, draw())


def test_the_published_search_has_ten_losses_and_keeps_the_best():
    """Of waves far shorter than the box, where a line search takes several losses."""
    calls, values, frequencies = [], [], np.linspace(1e4, 1e5, N)

    def waves(x: np.ndarray) -> tuple[float, np.ndarray]:
        calls.append(x)
        values.append(100 + float(np.sin(frequencies * x).sum()))
        return values[-1], frequencies * np.cos(frequencies * x)

    found = keskar(waves, np.zeros(N), 1e-3, draw(), climbs=0)
    assert len(calls) == 1 + 10
    assert found.best == found.published == pytest.approx(100 * (max(values) - 100) / 101)


def test_keskar_ignores_a_loss_that_is_not_a_number():
    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value = 1 + x.sum() if x.sum() < 1e-3 else np.nan
        return value, np.ones_like(x)

    assert 0 <= keskar(loss, np.zeros(4), 1e-3, draw()).best <= 100 * 1e-3 / 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_rise_of_a_quadratic(adaptive: bool):
    x, rho, slope = draw(1).standard_normal(N), 0.05, draw(2).standard_normal(N)
    scale = np.abs(x) if adaptive else np.ones(N)
    hessian = rotated()
    loss = quadratic(hessian, x, slope)
    step = rho * scale**2 * slope / np.linalg.norm(scale * slope)
    one_step, ascent = worst_rise([loss], x, rho, scale, 100, draw())
    assert one_step.value == pytest.approx(slope @ step + step @ hessian @ step / 2, rel=1e-9)
    scaled = hessian * np.outer(scale, scale)  # the problem in delta / scale: a trust region's, maximised
    values, vectors = np.linalg.eigh(scaled)
    components = vectors.T @ (scale * slope)
    low, high = values[-1], values[-1] + 1e4
    for _ in range(200):  # the multiplier mu with |(mu - H)^-1 g| = rho
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(components / (mu - values)) > rho else (low, mu)
    z = vectors @ (components / (mu - values))
    assert ascent.value == pytest.approx((scale * slope) @ z + z @ scaled @ z / 2, rel=1e-6)
    assert ascent.value > one_step.value


def test_a_step_that_overshoots_is_negative_and_the_worst_rise_is_not():
    """The ball holds x itself, where nothing rises. f = x - 50 x^2 rises to 0.005 at 0.01 and falls by 0.075 at 0.05."""

    def bump(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float((x - 50 * x**2).sum()), 1 - 100 * x

    for steps in (1, 4):
        one_step, ascent = worst_rise([bump], np.zeros(1), 0.05, np.ones(1), steps, draw())
        assert one_step.value == pytest.approx(0.05 - 50 * 0.05**2)
        assert ascent.value == 0
    straight = quadratic(np.zeros((1, 1)), np.zeros(1), np.ones(1))
    one_step, ascent = worst_rise([bump, straight], np.zeros(1), 0.05, np.ones(1), 4, draw())
    assert (one_step.value, ascent.value) == (pytest.approx((-0.075 + 0.05) / 2), pytest.approx((0 + 0.05) / 2))


def test_worst_rise_at_an_exact_minimum_is_the_top_eigenvalue():
    x = draw(1).standard_normal(N)
    _, ascent = worst_rise([quadratic(np.diag(CURVATURE), x)], x, 0.1, np.ones(N), 500, draw())
    assert ascent.value == pytest.approx(0.1**2 * CURVATURE.max() / 2, rel=1e-3)


def test_worst_rise_is_the_mean_over_mini_batches():
    x = np.zeros(3)
    losses = [quadratic(np.zeros((3, 3)), x, np.array([slope, 0, 0])) for slope in (1, 2, 6)]
    one_step, ascent = worst_rise(losses, x, 0.5, np.ones(3), 3, draw())
    assert one_step.value == ascent.value == pytest.approx(0.5 * 3)
    assert one_step.error == pytest.approx(0.5 * np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    overflow = worst_rise([*losses, lambda x: (np.nan if x.any() else 1.0, np.ones(3))], x, 0.5, np.ones(3), 3, draw())
    assert [e.value for e in overflow] == [np.inf, np.inf]


def test_average_rise_of_a_quadratic():
    x, hessian = draw(1).standard_normal(N), rotated()
    loss = quadratic(hessian, x, slope=100.0)  # the slope cancels in pairs

    for sigma in (np.full(N, 0.1), 0.1 * np.abs(x)):
        exact = (sigma**2 * np.diag(hessian)).sum() / 2
        value, error = average_rise(lambda y: loss(y)[0], x, sigma, 400, draw())
        sd = np.sqrt(((hessian * np.outer(sigma, sigma)) ** 2).sum() / 2 / 400)
        assert error == pytest.approx(sd, rel=0.2)
        assert value == pytest.approx(exact, abs=4 * sd)


QUICK = SharpnessSpec(
    samples=96, batch_size=40, eigenvalues=2, trace_probes=8, density_probes=1, density_steps=6, subspace=3, subspace_draws=3, m=32,
    ascent_steps=2, average_draws=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ImageData:
    return digits(300)[1]


def lenet(data: ImageData) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("lenet5", data.shape, data.classes)


@pytest.fixture(scope="module")
def measured(data: ImageData) -> Sharpness:
    return measure(lenet(data), data, data.train, QUICK)


def test_measure_is_repeatable_and_leaves_the_model_alone(data: ImageData, measured: Sharpness):
    model = lenet(data)
    before = fingerprint(model)
    torch.rand(5)  # no draw may depend on a generator's state
    assert measure(model, data, data.train, QUICK) == measured
    assert fingerprint(model) == before
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_sample_is_drawn_by_seed(data: ImageData):
    model = lenet(data)
    everything = Objective.of_sample(model, data, data.train, 10_000, 0)
    assert len(everything) == len(data.train)
    assert everything.value(everything.x) == pytest.approx(evaluate(model, data, data.train)[0], rel=1e-6)
    values = [Objective.of_sample(model, data, data.train, 50, seed).value(everything.x) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_results_are_json_and_a_row(data: ImageData, measured: Sharpness):
    assert Sharpness.from_json(json.loads(json.dumps(measured.as_json()))) == measured
    row = measured.row()
    assert all(np.isfinite(value) for value in row.values())
    assert measured.samples == 96
    assert measured.parameters == sum(p.numel() for p in lenet(data).parameters())
    assert row["eigenvalue_1"] >= row["eigenvalue_2"]
    assert row["trace_error"] == measured.trace.error
    assert row["keskar_subspace_0.001"] == measured.keskar_subspace[0].value
    assert row["keskar_subspace_0.001_error"] == measured.keskar_subspace[0].error > 0
    assert row["keskar_full_0.0005"] == measured.keskar_full[1] <= measured.keskar_full[0] == row["keskar_full_0.001"]
    assert row["sam_one_step"] <= row["sam_ascent"]


def test_the_value_in_subspaces_is_the_mean_over_draws(data: ImageData, measured: Sharpness):
    objective = Objective.of_sample(lenet(data), data, data.train, QUICK.samples, QUICK.seed, batch_size=40)
    values = []
    for index in range(1, QUICK.subspace_draws + 1):
        directions = random_subspace(len(objective.x), QUICK.subspace, stream(0, "sharpness", "subspace", index))
        values.append(keskar(objective.value_and_gradient, objective.x, 1e-3, draw(), directions, climbs=0).published)
    mean, error = measured.keskar_subspace_published[0]
    assert mean == pytest.approx(np.mean(values), rel=1e-6)
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=1e-5)
    assert measured.keskar_subspace[0].value == mean  # no search stalled, so none was helped


@pytest.mark.parametrize("rule", [None, 1, 3])
def test_results_of_another_rule_are_refused(measured: Sharpness, rule: int | None):
    plain = measured.as_json() | {"rule": rule}
    if rule is None:
        del plain["rule"]
    with pytest.raises(OldRule, match="the rule is 2 now: Keskar's subspaces"):
        Sharpness.from_json(plain)


def test_a_steeper_loss_is_sharper_by_every_measure(data: ImageData, measured: Sharpness):
    steep = lenet(data)
    with torch.no_grad():
        steep[-1].weight.mul_(10)
    low, high = measured.row(), measure(steep, data, data.train, QUICK).row()
    for name in ("eigenvalue_1", "trace", "keskar_full_0.001", "keskar_subspace_0.001", "sam_ascent", "sam_average"):
        assert high[name] > low[name]


def vgg9(data: ImageData) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("vgg9", data.shape, data.classes)


def test_batch_norm_is_differentiated_with_its_running_statistics(data: ImageData):
    model = vgg9(data).double()
    before = fingerprint(model)
    objective = Objective.of_sample(model, data, data.train, 4, 0)
    x, v = objective.x, draw().standard_normal(len(objective.x))
    v *= 1e-5 / np.linalg.norm(v)
    (_, ahead), (_, behind) = objective.value_and_gradient(x + v), objective.value_and_gradient(x - v)
    product = objective.hessian() @ v
    assert np.linalg.norm(product - (ahead - behind) / 2) < 1e-4 * np.linalg.norm(product)
    assert fingerprint(model) == before


@pytest.mark.slow
def test_networks_with_batch_norm_are_measured(data: ImageData):
    model = vgg9(data)
    before = fingerprint(model)
    spec = {
        "samples": 4, "eigenvalues": 1, "density_steps": 2, "epsilons": (1e-3,), "subspace": 2,
        "subspace_draws": 2, "ascent_steps": 1,
        "include": "weights",
    }  # fmt: skip
    found = measure(model, data, data.train, QUICK.model_copy(update=spec))
    assert fingerprint(model) == before
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert found.eigenvalues[0].value > 0
    assert found.eigenvalues[0].error < 0.01 * found.eigenvalues[0].value


def test_a_diverged_model_has_no_sharpness(data: ImageData):
    model = lenet(data)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss is nan"):
        measure(model, data, data.train, QUICK)


def test_reading_results_needs_no_torch():
    code = "import sys, lbstudy.analysis.minima.sharpness, lbstudy.analysis.minima.curves; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
