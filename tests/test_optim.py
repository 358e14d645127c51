"""LARS against its equations."""

import torch
from torch import nn

from lbstudy.optim.lars import LARS


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
