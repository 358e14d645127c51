"""SAM against a closed form and against plain loops of two passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbstudy.methods import models
from lbstudy.methods.smoothing.sam import SAM, Numbers, Settings
from lbstudy.parallel.randomness import derive_seed
from lbstudy.study.run import RunSpec
from lbstudy.training.data import EpochImages, ImageData
from lbstudy.training.train import train
from tests.training.test_train import digits, make_run

NET = "tests.networks:small"


def sam_on(model: nn.Module, radius: float, **settings: object) -> SAM:
    return SAM(model, Numbers(sam_radius=radius), Settings.model_validate(settings), seed=0)


class Quadratic(nn.Module):
    """1/2 w^T A w + b^T w, with a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.hessian = root @ root.T
        self.weight = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))

    def flat(self) -> torch.Tensor:
        return torch.cat([self.weight, self.bias])

    def gradient(self) -> list[torch.Tensor]:
        w = self.flat()
        return list(torch.autograd.grad(0.5 * w @ self.hessian @ w, [self.weight, self.bias]))


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_of_a_quadratic_is_that_of_the_closed_form(adaptive: bool):
    """At w + e the gradient is H (w + e), e = rho T^2 H w / ||T H w||."""
    model = Quadratic()
    w, rho = model.flat().detach(), 0.3
    scale = torch.ones(6, dtype=torch.float64)
    if adaptive:
        scale[:4] = w[:4].abs() + 0.01  # biases as they are
    gradient = model.hessian @ w
    expected = model.hessian @ (w + rho * scale**2 * gradient / (scale * gradient).norm())
    with sam_on(model, rho, adaptive=adaptive).ascended(0, model.gradient):
        found = torch.cat(model.gradient())
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert torch.equal(model.flat(), w)


def test_length_of_the_ascent_is_the_radius():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)).double()
    ascent = sam_on(model, 0.7).ascent([torch.randn_like(p) for p in model.parameters()])
    assert torch.cat([e.flatten() for e in ascent]).norm().item() == pytest.approx(0.7, rel=1e-12)


def test_weights_are_restored_to_the_bit_even_after_an_error():
    model = nn.Linear(30, 20)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), sam_on(model, 0.1).ascended(0, lambda: [p * 1.7 for p in before]):
        raise ZeroDivisionError
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_no_gradient_no_ascent():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with sam_on(model, 0.1, adaptive=True).ascended(0, lambda: [torch.zeros_like(p) for p in model.parameters()]):
        assert torch.equal(model.weight, before)


def plain_loop(run: RunSpec, data: ImageData, radius: float, ghost: int, adaptive: bool) -> tuple[nn.Module, float]:
    """SGD with momentum whose gradient is the mean of the ghost batches', each at its own w + e, in plain PyTorch.
    Returns the model and the mean loss of the second passes."""
    torch.manual_seed(derive_seed(run.seed, "initialisation"))
    model = models.build(run.model.name, data.shape, data.classes, run.ghost).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    images = EpochImages(data, run.dataset, run.seed, 1, torch.float64)
    losses = []
    for start in range(0, len(data.train), run.batch_size):
        stop = min(start + run.batch_size, len(data.train))
        total = [torch.zeros_like(p) for p in model.parameters()]
        for first in range(start, stop, ghost):
            places = torch.arange(first, min(first + ghost, stop))
            clean = [p.detach().clone() for p in model.parameters()]
            for climbing in (True, False):
                model.zero_grad()
                loss = F.cross_entropy(model(images.images(places)), images.labels(places))
                loss.backward()
                if not climbing:
                    break
                names = [name for name, _ in model.named_parameters()]
                scales = [p.detach().abs() + 0.01 if adaptive and n.endswith("weight") else torch.ones_like(p)
                          for n, p in zip(names, model.parameters(), strict=True)]  # fmt: skip
                grads = [p.grad for p in model.parameters()]
                norm = sum(((s * g) ** 2).sum() for s, g in zip(scales, grads, strict=True)).sqrt()
                with torch.no_grad():
                    for p, s, g in zip(model.parameters(), scales, grads, strict=True):
                        p += radius * s**2 * g / norm
            losses += [loss.item()] * len(places)
            for sums, p, c in zip(total, model.parameters(), clean, strict=True):
                sums += p.grad * len(places) / (stop - start)
                p.data.copy_(c)
        for sums, p in zip(total, model.parameters(), strict=True):
            p.grad = sums
        optimizer.step()
    return model, sum(losses) / len(losses)


CASES = {
    "LeNet-5": {"model": "lenet5"},
    "LeNet-5, adaptive": {"model": "lenet5", "sam": {"adaptive": True}},
    "LeNet-5, ghosts": {"model": "lenet5", "sam": {"ghost": 12}},
    "batch norm": {"model": NET},
    "batch norm of ghosts": {"model": NET, "batch_norm": {"ghost": 4}},
    "batch norm of ghosts, adaptive ghosts": {"model": NET, "batch_norm": {"ghost": 4}, "sam": {"ghost": 12, "adaptive": True}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_a_plain_loop_of_two_passes(case: str):
    dataset, data = digits(100)  # 80 train: mini-batches of 32, 32 and 16
    run = make_run(dataset, smoothing="sam", precision="fp64", batch_size=32, hyper={"sam_radius": 0.2}, **CASES[case])
    settings = run.settings.get("sam", {})
    outcome = train(run, data)
    model, loss = plain_loop(run, data, 0.2, settings.get("ghost", 32), settings.get("adaptive", False))
    for mine, theirs in zip(outcome.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert outcome.last.train_loss == pytest.approx(loss, rel=1e-10)
    descent, _ = plain_loop(run, data, 0.0, settings.get("ghost", 32), False)
    assert max(torch.dist(p, d) for p, d in zip(model.parameters(), descent.parameters(), strict=True)) > 1e-4
