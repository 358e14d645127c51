"""LARS against its equations."""

import numpy as np
import pytest
import torch
from torch import nn

from lbstudy.methods.optimizers import build
from lbstudy.methods.optimizers.lars import LARS
from tests.training.test_train import digits, make_run


def test_lars_follows_its_equations():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    b = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LARS([w, b], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    for _ in range(2):
        w.grad, b.grad = torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
        optimizer.step()
    # w points along its gradient, so only its length changes: |w| = 5, trust = 0.01 * 5 / (1 + 0.5), v = 0.5 trust 1.5
    first = 5 - 0.5 * (0.01 * 5 / 1.5) * 1.5
    second_velocity = 0.9 * (5 - first) + 0.5 * (0.01 * first / (1 + 0.1 * first)) * (1 + 0.1 * first)
    torch.testing.assert_close(w.norm(), torch.tensor(first - second_velocity, dtype=torch.float64))
    bias = 1 - 0.5 * 2.1
    torch.testing.assert_close(b, torch.tensor([bias - (0.9 * 1.05 + 0.5 * (2 + 0.1 * bias))], dtype=torch.float64))


def test_lars_moves_zero_weights():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LARS([w], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("one_dimensional", ["plain", "trust"])
def test_lars_of_tensors_of_one_dimension(one_dimensional: str):
    """You et al. 2017, algorithm 1, in NumPy; `plain` leaves the local rate out for biases."""
    random = np.random.default_rng(0)
    weights = [random.normal(size=shape) for shape in ((4, 3, 2, 2), (4,), (5, 4), (5,))]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights])
    dataset, _ = digits(100)
    hyper = {"learning_rate": 2, "weight_decay": 0.01, "trust_coefficient": 0.02, "momentum": 0.8}
    optimizer = build(
        make_run(dataset, optimizer="lars", hyper=hyper, lars={"one_dimensional": one_dimensional}), model
    )
    velocities = [np.zeros_like(w) for w in weights]
    for _ in range(5):
        for i, w in enumerate(weights):
            gradient = random.normal(size=w.shape)
            model[i].grad = torch.from_numpy(gradient.copy())
            local = 0.02 * np.linalg.norm(w) / (np.linalg.norm(gradient) + 0.01 * np.linalg.norm(w))
            rate = 2 * local if w.ndim > 1 or one_dimensional == "trust" else 2
            velocities[i] = 0.8 * velocities[i] + rate * (gradient + 0.01 * w)
            weights[i] = w - velocities[i]
        optimizer.step()
    for mine, its in zip(model, weights, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), its, rtol=0, atol=1e-13)
