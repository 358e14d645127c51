"""Muon against singular values, torch's Muon and AdamW, and itself with weights of another shape."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lbstudy.methods.models.lenet5 import LeNet5
from lbstudy.methods.optimizers.muon import QUINTIC, Muon, orthogonalised


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Its hidden weights are 1.weight (square), 2.weight (wide) and 3.weight (tall)."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 9), nn.Linear(9, 3))
    return layers.to(dtype)


HIDDEN = ["1.weight", "2.weight", "3.weight"]


def set_gradients(step: int, *models: nn.Module) -> None:
    """The same of each step for all models, whatever the shapes of their parameters."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        torch.manual_seed(step * 1000 + parameters[0].numel())
        gradient = torch.randn(parameters[0].numel(), dtype=torch.float64)
        for p in parameters:
            p.grad = gradient.view_as(p).to(p.dtype)


def assert_equal(mine: nn.Module, its: nn.Module, atol: float = 0.0) -> None:
    for (name, p), q in zip(mine.named_parameters(), its.parameters(), strict=True):
        torch.testing.assert_close(p.flatten(), q.flatten(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_acts_on_singular_values(shape: tuple[int, int], steps: int):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    np.testing.assert_allclose(orthogonalised(matrix, steps).numpy(), (u * s) @ vt, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_newton_schulz_comes_near_the_orthogonal_factor(dtype: torch.dtype):
    # singular values from 0.003 of the norm upwards end within the quintic's band
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(n, 20)))[0] for n in (20, 50))
    s = np.geomspace(1, 1e-2, 20)
    found = orthogonalised(torch.from_numpy((u * s) @ v.T).to(dtype), 5)
    assert found.dtype == dtype
    rotated = u.T @ found.double().numpy() @ v
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < (1e-13 if dtype == torch.float64 else 1e-5)
    assert 0.68 < np.diag(rotated).min() < np.diag(rotated).max() < 1.21
    assert not orthogonalised(torch.zeros(3, 4, dtype=dtype), 5).any()


@pytest.mark.parametrize(("exact", "atol"), [(True, 1e-13), (False, 1e-2)])
def test_hidden_weights_are_those_of_torchs_muon(exact: bool, atol: float, monkeypatch: pytest.MonkeyPatch):
    if exact:  # theirs orthogonalises in bfloat16, by name
        monkeypatch.setattr(torch, "bfloat16", torch.float64)
    mine, its = network(), network()
    keys: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = Muon(mine, **keys)
    hidden = [p for name, p in its.named_parameters() if name in HIDDEN]
    oracle = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **keys)
    for step in range(6):
        set_gradients(step, mine, its)
        optimizer.step()
        oracle.step()
    for name, p in mine.named_parameters():
        if name in HIDDEN:
            assert not torch.allclose(
                p, network().get_parameter(name), atol=0.05
            )  # a way that bfloat16's error is small to
            torch.testing.assert_close(p, its.get_parameter(name), rtol=0, atol=atol)


def test_the_rest_is_that_of_adamw():
    mine, its = network(), network()
    optimizer = Muon(mine, lr=0.05, weight_decay=0.1, rest_rate=0.3)
    rest = [p for name, p in its.named_parameters() if name not in HIDDEN]
    oracle = torch.optim.AdamW(rest, lr=0.3 * 0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(6):
        set_gradients(step, mine, its)
        for group in optimizer.param_groups:  # as a training loop sets a schedule
            group["lr"] = 0.05 / (1 + step) * group.get("lr_scale", 1.0)
        for group in oracle.param_groups:
            group["lr"] = 0.3 * 0.05 / (1 + step)
        if step == 2:
            mine[1].bias.grad = its[1].bias.grad = None
        optimizer.step()
        oracle.step()
    for name, p in mine.named_parameters():
        if name not in HIDDEN:
            torch.testing.assert_close(p, its.get_parameter(name), rtol=0, atol=1e-14)


def test_convolutions_are_flattened():
    def model(hidden: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), hidden, nn.Linear(2, 2)).double()

    convolutional, linear = model(nn.Conv2d(3, 5, (2, 4))), model(nn.Linear(24, 5))
    with torch.no_grad():
        for p, q in zip(convolutional.parameters(), linear.parameters(), strict=True):
            q.copy_(p.view_as(q))
    convolutional[1].to(memory_format=torch.channels_last)
    optimizers = [Muon(m, lr=0.05, weight_decay=0.1) for m in (convolutional, linear)]
    for step in range(3):
        set_gradients(step, convolutional, linear)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(convolutional, linear, atol=1e-14)


def test_a_step_is_as_large_as_adamws():
    # root mean square 0.2 of a step at lr = 1, whatever the shape, but for the quintic's band
    torch.manual_seed(0)
    for rows, columns in [(16, 16), (16, 200), (200, 16)]:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(columns, rows, bias=False), nn.Linear(2, 2)).double()
        before = model[1].weight.detach().clone()
        optimizer = Muon(model, lr=1.0)
        set_gradients(0, model)
        optimizer.step()
        assert (model[1].weight - before).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


class Blocks(nn.Module):
    """One of every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.table = nn.Parameter(torch.randn(9, 8))
        self.words = nn.Embedding(9, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.ModuleDict(
            {
                "grouped": nn.Conv2d(8, 8, 3, groups=2), "depthwise": nn.Conv2d(8, 8, 3, groups=8),
                "transposed": nn.ConvTranspose2d(8, 8, 2), "norm": nn.GroupNorm(2, 8), "linear": nn.Linear(8, 8),
                "gate": nn.Linear(8, 1), "tied": nn.Linear(8, 9), "attention": nn.MultiheadAttention(8, 2),
            }
        )  # fmt: skip
        self.body["tied"].weight = self.words.weight
        self.head = nn.Linear(8, 4)


def test_hidden_weights_are_named():
    body = [
        "grouped.weight",
        "transposed.weight",
        "linear.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert Muon(Blocks(), lr=1.0).hidden_weights == [f"body.{name}" for name in body]
    assert Muon(network(), lr=1.0).hidden_weights == HIDDEN
    assert Muon(LeNet5((1, 28, 28), 10), lr=1.0).hidden_weights == ["3.weight", "7.weight", "9.weight"]


def test_every_parameter_is_in_one_group():
    model = Blocks()
    found = [p for group in Muon(model, lr=1.0).param_groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))])
def test_a_model_without_hidden_weights_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match=f"first and last layer, but {type(model).__name__} has none"):
        Muon(model, lr=1.0)


def test_parameters_without_gradient_stay():
    model = network()
    before = copy.deepcopy(model)
    optimizer = Muon(model, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert_equal(model, before)
    set_gradients(0, model)
    model[2].weight.grad = model[0].weight.grad = None
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before.get_parameter(name))]
    assert still == ["0.weight", "2.weight"]


def test_a_resumed_run_is_the_uninterrupted_one():
    model = network(torch.float32)
    optimizer = Muon(model, lr=0.02, weight_decay=0.3, rest_rate=0.5)
    for step in range(6):
        if step == 3:
            file, resumed = io.BytesIO(), copy.deepcopy(model)
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = Muon(resumed, lr=1.0)
            other.load_state_dict(torch.load(file))
        set_gradients(step, model, *([resumed] if step >= 3 else []))
        optimizer.step()
        if step >= 3:
            other.step()
    assert_equal(resumed, model)


def test_it_learns():
    torch.manual_seed(0)
    inputs = torch.randn(64, 7)
    targets = torch.tanh(inputs @ torch.randn(7, 3))
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = Muon(model, lr=0.02)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < losses[0] / 20
