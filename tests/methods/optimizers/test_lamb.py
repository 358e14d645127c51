"""LAMB against its equations, in NumPy, and against timm."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lbstudy.methods.optimizers.lamb import LAMB

SHAPES = [(4, 3, 2, 2), (4,), (5, 4), (5,)]


def parameters(dtype: torch.dtype = torch.float64) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES])


def set_gradients(step: int, *models: nn.ParameterList) -> None:
    """The same of each step for all models."""
    random = np.random.default_rng(step)
    for i, shape in enumerate(SHAPES):
        gradient = torch.from_numpy(random.normal(size=shape))
        for model in models:
            model[i].grad = gradient.to(model[i].dtype)


def assert_equal(mine: nn.ParameterList, its: nn.ParameterList, atol: float = 0.0) -> None:
    for p, q in zip(mine, its, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("trust_one_dimensional", [False, True])
def test_lamb_follows_its_equations(trust_one_dimensional: bool):
    """You et al. 2020, algorithm 2, with phi(z) = z."""
    model = parameters()
    weights = [p.detach().numpy().copy() for p in model]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    keys: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.3}
    optimizer = LAMB(model, trust_one_dimensional=trust_one_dimensional, **keys)
    for t in (1, 2, 3):
        set_gradients(t, model)
        for i, p in enumerate(model):
            g = p.grad.numpy()
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.95 * second[i] + 0.05 * g**2
            r = first[i] / (1 - 0.8**t) / (np.sqrt(second[i] / (1 - 0.95**t)) + 1e-3) + 0.3 * weights[i]
            trust = np.linalg.norm(weights[i]) / np.linalg.norm(r) if g.ndim > 1 or trust_one_dimensional else 1
            weights[i] = weights[i] - 0.02 * trust * r
        optimizer.step()
    for p, its in zip(model, weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), its, rtol=0, atol=1e-14)


def test_two_steps_in_closed_form():
    # a constant gradient makes m_hat = g and v_hat = g^2, so r = 1 + 0.5 w with epsilon = 0, in both coordinates
    w = nn.Parameter(torch.tensor([[3.0, 3.0]], dtype=torch.float64))
    optimizer = LAMB([w], lr=0.1, epsilon=0.0, weight_decay=0.5)
    for _ in range(2):
        w.grad = torch.full_like(w, 7.0)
        optimizer.step()
    # the ratio takes r = 2.5 to w's own length, so a step is w <- (1 - lr) w: 2.7, then 2.43
    torch.testing.assert_close(w.detach(), torch.full_like(w, 2.43), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("trust_one_dimensional", "weight_decay"), [(True, 0.0), (True, 0.3), (False, 0.0)])
def test_lamb_is_that_of_timm(trust_one_dimensional: bool, weight_decay: float):
    timm = pytest.importorskip("timm.optim")
    mine, its = parameters(), parameters()
    optimizer = LAMB(mine, lr=0.02, weight_decay=weight_decay, trust_one_dimensional=trust_one_dimensional)
    groups = [  # theirs tells tensors apart by group
        {"params": [p for p in its if p.ndim > 1], "always_adapt": True},
        {"params": [p for p in its if p.ndim == 1], "always_adapt": trust_one_dimensional},
    ]
    oracle = timm.Lamb(groups, lr=0.02, eps=1e-6, weight_decay=weight_decay, max_grad_norm=None)
    for step in range(10):
        set_gradients(step, mine, its)
        optimizer.step()
        oracle.step()
    assert_equal(mine, its, atol=1e-13)


def test_tensors_of_one_dimension_are_those_of_adamw():
    mine, its = parameters(), parameters()
    optimizer = LAMB(mine, lr=0.02, weight_decay=0.3)
    oracle = torch.optim.AdamW(its, lr=0.02, eps=1e-6, weight_decay=0.3)
    for step in range(5):
        set_gradients(step, mine, its)
        if step == 2:
            mine[3].grad = its[3].grad = None  # from here on corrected by a step less
        optimizer.step()
        oracle.step()
    for i in (1, 3):
        torch.testing.assert_close(mine[i], its[i], rtol=0, atol=1e-14)
    assert not torch.allclose(mine[2], its[2], atol=1e-3)


def test_zero_tensors_take_the_plain_rate():
    w, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    w.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LAMB([w, still], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_parameters_without_gradient_stay():
    model = parameters()
    before = copy.deepcopy(model)
    optimizer = LAMB(model, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert_equal(model, before)
    set_gradients(0, model)
    model[0].grad = None
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model, before, strict=True)]
    assert moved == [False, True, True, True]
    assert model[0] not in optimizer.state


def test_a_resumed_run_is_the_uninterrupted_one():
    model = parameters(torch.float32)
    optimizer = LAMB(model, lr=0.02, weight_decay=0.3)
    for step in range(6):
        if step == 3:
            file, resumed = io.BytesIO(), copy.deepcopy(model)
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = LAMB(resumed, lr=1.0)
            other.load_state_dict(torch.load(file))
        set_gradients(step, model, *([resumed] if step >= 3 else []))
        optimizer.step()
        if step >= 3:
            other.step()
    assert_equal(resumed, model)
