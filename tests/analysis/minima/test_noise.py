"""The gradient noise scale against exact gradients of every sample, and the bias and errors of its estimators."""

from math import inf, sqrt

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lbstudy.analysis.minima import noise
from lbstudy.analysis.minima.noise import NoiseSpec
from lbstudy.methods import models
from lbstudy.study.run import RunSpec
from lbstudy.training.data import ImageData
from tests.training.test_train import digits, make_run


def setting(**keys: object) -> tuple[torch.nn.Module, RunSpec, ImageData]:
    """LeNet-5 in float64, not trained, on some digits."""
    spec, data = digits(160)
    torch.manual_seed(0)
    return (
        models.build("lenet5", data.shape, data.classes, None, {}).double(),
        make_run(spec, precision="fp64", **keys),
        data,
    )


def by_sample(model: torch.nn.Module, data: ImageData) -> np.ndarray:
    """The gradient of each training sample's loss: samples x parameters."""
    images = data.plain(data.train, slice(None), torch.float64)
    rows = []
    for image, label in zip(images, data.train.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy())
    return np.array(rows)


def test_single_samples_and_mini_batches_agree_with_exact_gradients():
    model, run, data = setting()
    exact = by_sample(model, data)
    trace, squared = exact.var(axis=0, ddof=1).sum(), float(np.square(exact.mean(axis=0)).sum())
    singles = noise.measure(model, run, data, 3, NoiseSpec(samples=128, batch_sizes=(1, 4, 16)))
    for found in singles:  # the variance falls as 1 / B, so that the trace is the same
        assert found.trace == pytest.approx(trace, abs=4 * found.trace_error)
        assert found.trace_error < 0.5 * trace
        assert found.squared_norm == pytest.approx(squared, rel=0.01)  # of all samples it has the whole
        assert found.scale == pytest.approx(found.trace / found.squared_norm)
    assert singles[0].trace == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("population", [400, inf])
def test_estimators_have_no_bias_and_errors_of_the_right_size(population: float):
    """Vectors of mean 0.2 and variance 1 in 50 dimensions; of a population, 100 of 400 are drawn without replacement."""
    random, dimensions, batch, count = np.random.default_rng(0), 50, 5, 20
    finite = random.normal(0.2, 1, (400, dimensions))
    traces, squares, errors = [], [], []
    for _ in range(800):
        if population == inf:
            samples = random.normal(0.2, 1, (batch * count, dimensions))
        else:
            samples = finite[random.permutation(400)[: batch * count]]
        gradients = samples.reshape(count, batch, dimensions).mean(axis=1)
        found = noise.estimate(gradients @ gradients.T, batch, population)
        traces.append(found["trace"])
        squares.append(found["squared_norm"])
        errors.append((found["trace_error"], found["squared_norm_error"]))
    truth = (50, 50 * 0.04) if population == inf else (
        finite.var(axis=0, ddof=1).sum(), np.square(finite.mean(axis=0)).sum()
    )  # fmt: skip
    for values, exact in zip((traces, squares), truth, strict=True):
        assert np.mean(values) == pytest.approx(exact, abs=4 * np.std(values) / sqrt(len(values)))
    if population == inf:
        spread = [np.std(traces), np.std(squares)]
        assert np.sqrt(np.mean(np.square(errors), axis=0)) == pytest.approx(spread, rel=0.15)
        plain = np.mean(squares) + 50 / 100  # |mean|^2 would be too large by tr(Sigma) / (K B)
        assert plain > 1.2 * truth[1]


def test_without_a_gradient_the_scale_is_infinite():
    gradients = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    found = noise.estimate(gradients @ gradients.T, 8)
    assert found["squared_norm"] < 0
    assert found["scale"] == inf


def test_smoothing_is_in_force_and_left_out():
    model, run, data = setting(smoothing="mixup+noise", hyper={"mixup_alpha": 1.0, "noise_magnitude": 0.05})
    before = [p.detach().clone() for p in model.parameters()]
    spec = NoiseSpec(samples=128, batch_sizes=(8, 32))
    plain, mixed = (
        {found.batch_size: found for found in noise.measure(model, run, data, 0, spec) if found.smoothed == smoothed}
        for smoothed in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    alone = noise.measure(model, run.model_copy(update={"smoothing": "none"}), data, 0, spec)
    assert list(plain.values()) == alone
    assert plain[8].trace != mixed[8].trace
    # A mini-batch shares its coefficient and its noise, so that its variance falls more slowly than 1 / B.
    assert mixed[32].trace / mixed[8].trace > plain[32].trace / plain[8].trace


@pytest.mark.parametrize("optimizer", ["kfac", "adamw"])
def test_the_gradient_is_that_of_the_loss_whatever_the_optimizer(optimizer: str):
    model, run, data = setting()
    other = setting(optimizer=optimizer)[1]
    spec = NoiseSpec(samples=128, batch_sizes=(16,))
    assert noise.measure(model, run, data, 0, spec) == noise.measure(model, other, data, 0, spec)


def test_batch_sizes_with_too_few_mini_batches_are_left_out():
    model, run, data = setting()
    found = noise.measure(model, run, data, 0, NoiseSpec(samples=10_000, batch_sizes=(32, 64)))
    assert [one.batch_size for one in found] == [32]
