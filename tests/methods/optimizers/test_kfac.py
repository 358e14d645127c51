"""K-FAC against brute force over single samples, against curvlinops, and against itself in other divisions of work."""

import copy
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.optimizers.kfac import KFAC, exchange, factors
from lbstudy.methods.optimizers.kfac.blocks import KroneckerBlock
from lbstudy.methods.optimizers.kfac.ties import max_pool
from lbstudy.methods.smoothing import Combined, Inputs
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.training.train import EpochReport, Snapshot, train
from tests.training.test_train import digits, make_run

CLASSES = 3


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def convolutional(stride: int = 1, padding: int = 1, dilation: int = 1, bias: bool = True) -> nn.Sequential:
    """Two convolutions of 2 x 9 x 8 images and a linear layer, small enough for single-sample gradients."""
    layers = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride, padding, dilation, bias=bias), nn.Tanh(), nn.Conv2d(3, 4, 3, bias=bias), nn.Tanh(), nn.Flatten(),
    )  # fmt: skip
    return nn.Sequential(*layers, nn.Linear(layers(torch.zeros(1, 2, 9, 8)).shape[1], CLASSES, bias=bias))


def samples(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 9, 8), torch.randint(CLASSES, (count,))


def kfac(model: nn.Module, **keys: object) -> KFAC:
    """K-FAC whose step is its direction."""
    return KFAC(model, **{"lr": 1.0, "momentum": 0.0, **keys})  # type: ignore[arg-type]


def observe(optimizer: KFAC, model: nn.Module, images: Tensor, labels: Tensor, **keys: object) -> None:
    """One pass over a whole mini-batch, as train() makes it."""
    with optimizer.capture(len(images), **keys):  # type: ignore[arg-type]
        (F.cross_entropy(model(images), labels, reduction="sum") / len(images)).backward()


def take_step(optimizer: KFAC) -> list[Tensor]:
    """What a step subtracts from the parameters; these are as before afterwards."""
    parameters = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    taken = [old - new.detach() for old, new in zip(before, parameters, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)
    return taken


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def factors_of(optimizer: KFAC, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    states = [optimizer.state[layer.weight] for layer in layers_of(model)]
    return [(state["input_factor"], state["gradient_factor"]) for state in states]


def patches(layer: nn.Conv2d, image: Tensor) -> Iterator[Tensor]:
    """The patches that a convolution sees, cut out by hand."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    image = F.pad(image, (pw, pw, ph, ph))  # type: ignore[arg-type]
    for i in range(0, image.shape[1] - dh * (kh - 1), sh):
        for j in range(0, image.shape[2] - dw * (kw - 1), sw):
            yield image[:, i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw]


def brute_force(model: nn.Sequential, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A and G of every layer, sample by sample and patch by patch."""
    layers = layers_of(model)
    totals = [[torch.zeros(()), torch.zeros(())] for _ in layers]
    for image, label in zip(images, labels, strict=True):
        inputs, outputs, x = {}, {}, image[None]
        for layer in model:
            inputs[layer] = x
            outputs[layer] = x = layer(x)
        gradients = torch.autograd.grad(F.cross_entropy(x, label[None]), [outputs[m] for m in layers])
        for total, layer, gradient in zip(totals, layers, gradients, strict=True):
            for part in patches(layer, inputs[layer][0]) if isinstance(layer, nn.Conv2d) else [inputs[layer][0]]:
                a = torch.cat([part.flatten(), torch.ones(1)]) if layer.bias is not None else part.flatten()
                total[0] = total[0] + torch.outer(a, a).detach() / len(images)
            columns = gradient[0].reshape(gradient.shape[1], -1)
            total[1] = total[1] + columns @ columns.T / columns.shape[1] / len(images)
    return [(a, g) for a, g in totals]


def assert_factors(found: list[tuple[Tensor, Tensor]], true: list[tuple[Tensor, Tensor]]) -> None:
    for pair, true_pair in zip(found, true, strict=True):
        for factor, true_factor in zip(pair, true_pair, strict=True):
            torch.testing.assert_close(factor, true_factor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("geometry", [(1, 1, 1), (1, 0, 1), (2, 1, 1), (1, 1, 2), (1, "same", 1)])
def test_factors_are_those_of_single_samples(geometry: tuple, bias: bool, wide: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(factors, "WIDE", 1 if wide else 10**9)
    monkeypatch.setitem(factors.CHUNK, "cpu", 1000)  # several chunks of samples
    if geometry[1] == "same" and not bias:
        pytest.skip("same padding is told apart by one case")
    model, (images, labels) = convolutional(*geometry, bias=bias), samples()
    optimizer = kfac(model)
    observe(optimizer, model, images, labels)
    take_step(optimizer)
    empty = model[0](images[:0])
    block = KroneckerBlock(model[0], "0", "pi")
    assert torch.equal(block.input_sum(images[:0]), block.zeros("input_factor"))
    assert torch.equal(block.gradient_sum(empty), block.zeros("gradient_factor"))
    if geometry[1] == "same":  # 3 x 2 kernel: one row above and below, one column to the right
        images, model[0].padding = F.pad(images, (0, 1, 1, 1)), (0, 0)
    assert_factors(factors_of(optimizer, model), brute_force(model, images, labels))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["pi", "eigen"])
def test_factors_and_directions_equal_curvlinops(form: str, bias: bool):
    model, (images, labels) = convolutional(bias=bias), samples()
    optimizer = kfac(model, damping=1e-2, damping_form=form)
    observe(optimizer, model, images, labels)
    oracle = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(images, labels)], fisher_type="empirical",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    inverse = KFACInverseLinearOperator(
        oracle, damping=1e-2, use_heuristic_damping=form == "pi", use_exact_damping=form == "eigen"
    )
    expected = inverse @ [p.grad.clone() for p in model.parameters()]
    for mine, its in zip(take_step(optimizer), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-8)
    positions = [9 * 9, 7 * 7, 1]  # outputs of the convolutions; the oracle puts this number into G, we into A
    oracle_factors = [
        (oracle._input_covariances[name] * t, oracle._gradient_covariances[name] / t)
        for name, t in zip(["0", "2", "5"], positions, strict=True)
    ]
    assert_factors(factors_of(optimizer, model), oracle_factors)


def test_mixup_takes_gradients_of_the_soft_label():
    model, (images, labels) = convolutional(), samples()
    partners, coefficients = labels.flip(0), torch.rand(len(labels))
    optimizer = kfac(model)
    with optimizer.capture(len(images)):
        mixed = Inputs(images, labels, partners, coefficients)
        (Combined([]).loss_sum(model(images), mixed) / len(images)).backward()
    take_step(optimizer)
    soft = coefficients[:, None] * F.one_hot(labels, CLASSES) + (1 - coefficients)[:, None] * F.one_hot(
        partners, CLASSES
    )
    gradients = (model(images).softmax(1) - soft).detach()
    torch.testing.assert_close(factors_of(optimizer, model)[-1][1], gradients.T @ gradients / len(images))


def test_monte_carlo_agrees_with_the_fisher_in_the_mean():
    model, (images, labels) = convolutional(), samples()
    optimizer = kfac(model, fisher="monte_carlo", past_weight=0.0, inverse_interval=10**9)
    totals = [
        torch.zeros_like(layer.weight[:, :1].flatten(1) @ layer.weight[:, :1].flatten(1).T)
        for layer in layers_of(model)
    ]
    squares = [torch.zeros_like(t) for t in totals]
    repeats = 400
    for _ in range(repeats):
        observe(optimizer, model, images, labels)
        take_step(optimizer)
        for total, square, (_, g) in zip(totals, squares, factors_of(optimizer, model), strict=True):
            total += g / repeats
            square += g**2 / repeats
    true = [torch.zeros_like(t) for t in totals]
    probabilities = model(images).softmax(1).detach()
    for label in range(CLASSES):  # the expectation over labels, by weighting each sample's products
        for i in range(len(images)):
            for total, (_, g) in zip(true, brute_force(model, images[i : i + 1], torch.tensor([label])), strict=True):
                total += probabilities[i, label] * g / len(images)
    for total, square, exact in zip(totals, squares, true, strict=True):
        error = ((square - total**2).clamp(min=0) / repeats).sqrt() + 1e-12
        assert ((total - exact).abs() < 5 * error).all()
        assert ((total - exact).norm() / exact.norm()) < 0.1


def test_a_single_linear_layer_gives_the_natural_gradient():
    # inputs +-e_i with every gradient alike in distribution: A and G are independent, so the block is the Fisher itself
    model = nn.Sequential(nn.Linear(4, CLASSES, bias=False))
    nn.init.zeros_(model[0].weight)  # equal predictions: g does not depend on the input
    images = torch.randn(5, 4).repeat_interleave(CLASSES, 0)
    labels = torch.arange(CLASSES).repeat(5)
    optimizer = kfac(model, damping=1e-3, damping_form="eigen")
    observe(optimizer, model, images, labels)
    gradients = []
    for image, label in zip(images, labels, strict=True):
        gradients.append(
            torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), model[0].weight)[0].flatten()
        )
    fisher = torch.stack(gradients).T @ torch.stack(gradients) / len(images)
    exact = torch.linalg.solve(fisher + 1e-3 * torch.eye(len(fisher)), model[0].weight.grad.flatten())
    torch.testing.assert_close(take_step(optimizer)[0].flatten(), exact, rtol=0, atol=1e-10)


def cosine(first: list[Tensor], second: list[Tensor]) -> float:
    return F.cosine_similarity(
        *(torch.cat([t.flatten() for t in tensors]) for tensors in (first, second)), dim=0
    ).item()


def test_direction_does_not_depend_on_the_size_of_the_mini_batch():
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    images = torch.randn(8192, 10) * torch.logspace(0, -2, 10)  # ill-conditioned
    labels = (images @ torch.randn(10, CLASSES)).argmax(1)
    cosines = []
    for count in (128, 2048, 8192):
        part, part_labels = images[:count], labels[:count]
        optimizer = kfac(model, damping=3e-3)
        optimizer.zero_grad()
        observe(optimizer, model, part, part_labels)
        gradient = [p.grad.clone() for p in model.parameters()]
        cosines.append(cosine(take_step(optimizer), gradient))
        hidden = model[1](model[0](part))
        output = model[2](hidden).softmax(1) - F.one_hot(part_labels, CLASSES)
        first = (output @ model[2].weight) * (1 - hidden**2)
        traces = [(part, first), (hidden, output)]  # a of every sample without its 1, and g
        for (a, g), (inputs, gradients) in zip(factors_of(optimizer, model), traces, strict=True):
            assert a.trace().item() == pytest.approx((inputs**2).sum(1).mean().item() + 1, rel=1e-10)
            assert g.trace().item() == pytest.approx((gradients**2).sum(1).mean().item(), rel=1e-10)
    assert max(cosines) < 0.9
    assert max(cosines) - min(cosines) < 0.2


@pytest.mark.parametrize("form", ["pi", "eigen"])
def test_large_damping_gives_the_gradient(form: str):
    model, (images, labels) = with_batch_norm(), samples()
    optimizer = kfac(model, lr=1e12, damping=1e12, damping_form=form)  # a step of a size that shows beside the weights
    observe(optimizer, model, images, labels)
    gradient = [p.grad.clone() for p in model.parameters()]
    direction = take_step(optimizer)
    assert cosine(direction, gradient) > 1 - 1e-6


def with_batch_norm(ghost: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), BatchNorm(3, ghost), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(126, CLASSES), BatchNorm(CLASSES, ghost),
    )  # fmt: skip


@pytest.mark.parametrize("ghost", [None, 5])
def test_batch_norm_has_a_block_for_each_channel(ghost: int | None):
    model, (images, labels) = with_batch_norm(ghost), samples()
    with torch.no_grad():
        model[1].weight.copy_(
            torch.tensor([0.0, 0.5, -2.0])
        )  # a weight of zero hides the normalised input in the output
    optimizer = kfac(model, damping=1e-2)
    observe(optimizer, model, images, labels)
    x = model[0](images)
    parts = [F.batch_norm(part, None, None, training=True, eps=model[1].eps) for part in x.split(ghost or len(x))]
    normalised = torch.cat(parts).detach().requires_grad_()
    weight, bias = (
        t.detach().expand(len(images), 3).clone().requires_grad_() for t in (model[1].weight, model[1].bias)
    )
    output = model[2:](normalised * weight[:, :, None, None] + bias[:, :, None, None])  # its own copy for every sample
    gradients = torch.autograd.grad(F.cross_entropy(output, labels, reduction="sum"), (weight, bias))
    pairs = torch.stack(gradients, dim=2)  # N x C x 2
    fisher = torch.einsum("nci,ncj->cij", pairs, pairs) / len(images) + 1e-2 * torch.eye(2)
    mean = torch.stack(gradients, dim=2).mean(0)
    expected = torch.linalg.solve(fisher, mean)
    direction = take_step(optimizer)
    torch.testing.assert_close(torch.stack(direction[2:4], dim=1), expected, rtol=0, atol=1e-10)
    optimizer = kfac(model, batch_norm="plain")
    observe(optimizer, model, images, labels)
    gradient = model[1].weight.grad.clone()
    torch.testing.assert_close(take_step(optimizer)[2], gradient)


def test_passes_and_copies_add_up():
    model, (images, labels) = convolutional(), samples()
    whole, parts, copies = (kfac(model) for _ in range(3))
    observe(whole, model, images, labels)
    expected = take_step(whole)
    model.zero_grad()
    for part in (slice(0, 5), slice(5, 10), slice(10, 12)):
        with parts.capture(12, part, last=part.stop == 12):
            (F.cross_entropy(model(images[part]), labels[part], reduction="sum") / 12).backward()
    for mine, its in zip(take_step(parts), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
    model.zero_grad()
    noised = copy.deepcopy(model)
    with torch.no_grad():
        for p in noised.parameters():
            p.add_(0.1 * torch.randn_like(p))
    clean = [p.detach().clone() for p in model.parameters()]
    for number, weights in enumerate((list(model.parameters()), list(noised.parameters()))):
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), weights)
        with copies.capture(12, copy=number, copies=2, last=number == 1):
            (F.cross_entropy(model(images), labels, reduction="sum") / 2 / 12).backward()
    take_step(copies)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), clean)
    truths = [brute_force(m, images, labels) for m in (model, noised)]
    mean = [((a + b) / 2, (g + h) / 2) for (a, g), (b, h) in zip(*truths, strict=True)]
    assert_factors(factors_of(copies, model), mean)


def test_averages_weigh_the_past_and_intervals_are_kept():
    model, (images, labels) = convolutional(), samples()
    optimizer = kfac(model, past_weight=0.75, factor_interval=2, inverse_interval=3)
    seen, averages, inverses = [], [], []
    for step in range(5):
        batch = images[step * 2 : step * 2 + 4]
        observe(optimizer, model, batch, labels[step * 2 : step * 2 + 4])
        take_step(optimizer)
        seen.append(brute_force(model, batch, labels[step * 2 : step * 2 + 4])[0][0])
        averages.append(factors_of(optimizer, model)[0][0].clone())
        inverses.append(optimizer.state[model[0].weight]["input_inverse"].clone())
    torch.testing.assert_close(averages[0], seen[0])
    assert torch.equal(averages[1], averages[0])
    torch.testing.assert_close(averages[2], 0.75 * seen[0] + 0.25 * seen[2])
    assert [not torch.equal(a, b) for a, b in pairwise(inverses)] == [False, False, True, False]


@pytest.mark.parametrize("nesterov", [False, True])
def test_decay_and_momentum_are_those_of_sgd(nesterov: bool):
    model, (images, labels) = convolutional(), samples()
    reference = copy.deepcopy(model)
    keys: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": nesterov}
    optimizer, sgd = kfac(model, **keys), torch.optim.SGD(reference.parameters(), **keys)
    twin = kfac(copy.deepcopy(model))  # tells the bare direction
    for _ in range(3):
        with torch.no_grad():
            for p, q in zip(twin.param_groups[0]["params"], model.parameters(), strict=True):
                p.copy_(q)
        twin.zero_grad()
        observe(twin, twin._model, images, labels)
        for p, d in zip(reference.parameters(), take_step(twin), strict=True):
            p.grad = d
        sgd.step()
        optimizer.zero_grad()
        observe(optimizer, model, images, labels)
        optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_decay_in_the_gradient_is_preconditioned():
    model, (images, labels) = with_batch_norm(), samples()
    keys: dict[str, Any] = {"lr": 0.5, "kl_clip": 1e-4}
    decayed, plain = kfac(model, weight_decay=0.3, decay_in_gradient=True, **keys), kfac(model, **keys)
    observe(decayed, model, images, labels)
    step = take_step(decayed)
    model.zero_grad()
    observe(plain, model, images, labels)
    for p in model.parameters():
        p.grad += 0.3 * p.detach()
    for mine, its in zip(step, take_step(plain), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("form", "order"), [("eigen", 1), ("pi", 0.5)])
def test_large_damping_is_sgd(form: str, order: float, nesterov: bool):
    start, (images, labels) = with_batch_norm(), samples()

    def trajectory(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Tensor:
        model = copy.deepcopy(start)
        optimizer = make(model)
        for step in range(5):
            optimizer.zero_grad()
            part = slice(step, step + 8)
            if isinstance(optimizer, KFAC):
                observe(optimizer, model, images[part], labels[part])
            else:
                F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    keys: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": nesterov}
    sgd = trajectory(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, **keys))

    def error(damping: float, decay_in_gradient: bool = True) -> float:
        keys["decay_in_gradient"] = decay_in_gradient
        return torch.dist(
            sgd,
            trajectory(lambda m: KFAC(m, lr=0.1 * damping, damping=damping, damping_form=form, **keys)),  # type: ignore[arg-type]
        ).item()

    errors = [error(damping) for damping in (1e8, 1e9, 1e10)]
    for nearer, farther in zip(errors[1:], errors, strict=False):
        assert farther / nearer == pytest.approx(10**order, rel=0.05)
    assert errors[-1] < 1e-3
    assert error(1e6, decay_in_gradient=False) > 1e3  # plain decay is 1e6 times SGD's


def test_how_far_from_sgd_usual_dampings_are():
    # the figures in docs/study-file.md, and what health.LARGE_DAMPING rests on
    torch.set_default_dtype(torch.float32)  # in which initial weights are drawn
    dataset, data = digits()
    run = make_run(dataset, batch_size=32, precision="fp64", hyper={"weight_decay": 0})
    model = train(run, data).model.train()
    images, labels = data.plain(data.train, slice(256), torch.float64), data.train.labels[:256]
    errors = []
    for damping in (1, 1e2, 1e4):
        model.zero_grad()
        optimizer = kfac(model, lr=damping, damping=damping)
        observe(optimizer, model, images, labels)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        errors.append(
            (torch.dist(torch.cat([s.flatten() for s in take_step(optimizer)]), gradient) / gradient.norm()).item()
        )
    assert errors == pytest.approx([0.74, 0.30, 0.047], rel=0.05)


def test_a_run_with_large_damping_is_that_of_sgd():
    torch.set_default_dtype(torch.float32)
    dataset, data = digits(300)
    keys: dict[str, Any] = {"nesterov": True, "precision": "fp64", "smoothing": "mixup+noise"}
    sgd = make_run(dataset, hyper={"learning_rate": 0.05}, **keys)
    spec = {"damping_form": "eigen", "weight_decay": "preconditioned"}
    large = make_run(dataset, optimizer="kfac", hyper={"learning_rate": 5e8, "damping": 1e10}, kfac=spec, **keys)
    for mine, its in zip(train(large, data).model.parameters(), train(sgd, data).model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-9)


def test_kl_clip_bounds_the_step():
    model, (images, labels) = with_batch_norm(), samples()
    free, clipped = kfac(model, lr=0.5), kfac(model, lr=0.5, kl_clip=1e-4)
    steps = []
    for optimizer in (free, clipped):
        optimizer.zero_grad()
        observe(optimizer, model, images, labels)
        steps.append([s / 0.5 for s in take_step(optimizer)])
    change = 0.5**2 * sum((s * p.grad).sum().item() for s, p in zip(steps[0], model.parameters(), strict=True))
    ratio = (1e-4 / change) ** 0.5  # the change of the scaled step is ratio^2 of this, and so 1e-4
    assert ratio < 1
    for s, t in zip(*steps, strict=True):
        torch.testing.assert_close(t, s * ratio)


def test_fallbacks_are_counted():
    indefinite = torch.diag(torch.tensor([1.0, -1e-3, 2.0]))
    infinite = torch.full((3, 3), torch.inf)
    pairs = [(torch.eye(3), torch.tensor(1.0)), (indefinite, torch.tensor(1e-6)), (infinite, torch.tensor(1e-2))]
    lower, failed = factors.damped_choleskys(pairs)
    assert failed == [1, 2]
    assert (lower[1] @ lower[1].T).diagonal().min() > 0
    assert factors.damped_choleskys([(indefinite, torch.tensor(1e-2))])[1] == []
    assert factors.damped_choleskys([]) == ([], [])
    inverses, count = factors.damped_inverses(pairs)
    assert (count, inverses[2].isnan().all().item()) == (2, True)
    torch.testing.assert_close(inverses[0], torch.eye(3) / 2)
    model, (images, labels) = convolutional(), samples()
    optimizer = kfac(model, inverse_interval=1)
    observe(optimizer, model, images, labels)
    take_step(optimizer)
    assert optimizer.fallbacks == 0
    optimizer.state[model[0].weight]["input_factor"].diagonal().sub_(1e3)
    observe(optimizer, model, images, labels)
    assert all(d.isfinite().all() for d in take_step(optimizer))
    assert optimizer.fallbacks == 1


def test_large_factors_are_solved_instead_of_inverted(monkeypatch: pytest.MonkeyPatch):
    model, (images, labels) = convolutional(), samples()
    steps = []
    for large in (factors.LARGE, 10):
        monkeypatch.setattr(factors, "LARGE", large)
        optimizer = kfac(model)
        optimizer.zero_grad()
        observe(optimizer, model, images, labels)
        steps.append(take_step(optimizer))
    for s, t in zip(*steps, strict=True):
        torch.testing.assert_close(s, t, rtol=0, atol=1e-10)


def test_nothing_stays_on_the_model():
    model, (images, labels) = with_batch_norm(), samples()
    model.insert(3, nn.MaxPool2d(1))
    optimizer = kfac(model, factor_interval=2)
    with pytest.raises(RuntimeError), optimizer.capture(len(images)):
        model(images[:, :1])  # a forward pass that fails
    optimizer = kfac(model, factor_interval=2)
    for hooked in (True, False):
        with optimizer.capture(len(images)):
            assert any(m._forward_hooks for m in model.modules()) == hooked
            (F.cross_entropy(model(images), labels, reduction="sum") / len(images)).backward()
        take_step(optimizer)
    for module in model.modules():
        assert not [*module._forward_hooks, *module._backward_hooks, *module._forward_pre_hooks]
        assert "forward" not in vars(module)
    model.eval()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, images), labels)

    vector = {name: torch.randn_like(p) for name, p in parameters.items()}
    product = torch.func.jvp(torch.func.grad(loss), (parameters,), (vector,))[1]
    assert all(p.isfinite().all() for p in product.values())


def test_half_precision_passes_leave_single_precision_factors():
    torch.set_default_dtype(torch.float32)
    model, (images, labels) = with_batch_norm(), samples()
    optimizer = kfac(model, fisher="monte_carlo")
    with optimizer.capture(len(images)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        (F.cross_entropy(logits.float(), labels, reduction="sum") / len(images)).backward()
    take_step(optimizer)
    assert all(v.dtype == torch.float32 for state in optimizer.state.values() for v in state.values())
    a = factors_of(optimizer, model)[0][0]
    rows = torch.stack([torch.cat([p.flatten(), torch.ones(1)]) for image in images for p in patches(model[0], image)])
    torch.testing.assert_close(
        a, rows.T @ rows / len(images), rtol=1e-4, atol=1e-4
    )  # bf16 products would be off by 1e-2


def test_step_without_statistics_says_so():
    model, (images, labels) = convolutional(), samples()
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(RuntimeError, match="within `capture`"):
        kfac(model).step()


class Rounding(nn.Module):
    """Changes its inputs by a relative 1e-15, otherwise in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-15 * torch.randn_like(x))


def test_rounding_does_not_settle_ties_of_max_pooling():
    # whole numbers: on an even background equal outputs of the convolution are equal to the bit, and the first wins
    images, labels = torch.zeros(6, 1, 9, 9), torch.randint(CLASSES, (6,))
    images[:, :, 2:5, 3:6] = torch.randint(4, (6, 1, 3, 3))
    convolution, pool = nn.Conv2d(1, 3, 2), nn.MaxPool2d(2)
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-3, 4, (3, 1, 2, 2)))
        convolution.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    end = [nn.Flatten(), nn.Linear(48, CLASSES)]
    outputs = convolution(images)
    loss = F.cross_entropy(nn.Sequential(nn.ReLU(), pool, *end)(outputs), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, outputs)[0].transpose(0, 1).flatten(1)
    exact = gradients @ gradients.T / outputs[0, 0].numel() / len(images)
    model = nn.Sequential(convolution, Rounding(), nn.ReLU(), pool, *end)
    for _ in range(3):
        optimizer = kfac(model)
        observe(optimizer, model, images, labels)
        take_step(optimizer)
        torch.testing.assert_close(factors_of(optimizer, model)[0][1], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", [{}, {"stride": 1}, {"padding": 1}, {"ceil_mode": True}])
@pytest.mark.parametrize("kernel", [2, 3, (2, 3)])
def test_inputs_that_differ_are_pooled_as_ever(kernel: Any, keys: dict[str, Any]):
    layer, images = nn.MaxPool2d(kernel, **keys), torch.randn(5, 3, 10, 11, requires_grad=True)
    pooled, expected = max_pool(layer, images), layer(images)
    assert torch.equal(pooled, expected)
    weights = torch.randn_like(pooled)
    mine, its = (torch.autograd.grad((weights * out).sum(), images)[0] for out in (pooled, expected))
    torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("order", [1, 2, 3, 6, 7])
def test_packed_triangles(order: int):
    matrix = torch.randn(order, order)
    packed = exchange.pack(matrix)
    assert len(packed) == order * (order + 1) // 2
    assert torch.equal(exchange.unpack(packed, order), matrix.triu())
    assert torch.equal(exchange.symmetric(matrix.triu()), matrix.triu() + matrix.triu(1).T)


def test_inversions_are_assigned_by_cost():
    costs = [size**3 for size in (28, 577, 577, 1153, 1153, 2305, 2305)]
    owners = exchange.assign(costs, 2)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == worker) for worker in range(2)]
    assert max(loads) / sum(costs) < 0.51
    assert exchange.assign([3.0, 1.0, 1.0, 1.0], 3) == [0, 1, 2, 1]


def test_a_resumed_run_is_the_uninterrupted_one():
    # the snapshot lies between two updates of the inverses, and travels through a file
    dataset, data = digits(300)
    run = make_run(
        dataset, optimizer="kfac", model="lenet5", smoothing="mixup+noise", budget={"epochs": 3},
        hyper={"learning_rate": 3e-3, "factor_interval": 2, "inverse_interval": 5}, kfac={"fisher": "monte_carlo"},
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    files = []

    def keep(report: EpochReport, snapshot: Callable[[], Snapshot]) -> bool:
        files.append(io.BytesIO())
        torch.save(snapshot(), files[-1])
        return False

    whole = train(run, data, on_epoch=keep)
    assert train(run, data).fingerprint == whole.fingerprint
    for file in files[:2]:
        file.seek(0)
        assert train(run, data, resume=torch.load(file)).fingerprint == whole.fingerprint
    other = run.model_copy(update={"settings": {}})
    assert train(other, data).fingerprint != whole.fingerprint


def test_intervals_grow_at_their_milestones(monkeypatch: pytest.MonkeyPatch):
    inverted, updated = [], []
    update_inverses, update_statistics = KFAC._update_inverses, KFAC._update_statistics

    def invert(self: KFAC, group: dict[str, Any]) -> None:
        inverted.append(group["step"])
        update_inverses(self, group)

    def update(self: KFAC, group: dict[str, Any]) -> None:
        updated.extend([group["step"]] * bool(self._pending))
        update_statistics(self, group)

    monkeypatch.setattr(KFAC, "_update_inverses", invert)
    monkeypatch.setattr(KFAC, "_update_statistics", update)
    torch.set_default_dtype(torch.float32)
    dataset, data = digits(100)  # 80 training samples: five steps an epoch
    run = make_run(
        dataset, optimizer="kfac", batch_size=16, budget={"epochs": 4}, hyper={"learning_rate": 1e-3, "inverse_interval": 2},
        kfac={"interval_milestones": [2, 4], "interval_factor": 2},
    )  # fmt: skip
    states = []
    train(run, data, on_epoch=lambda report, snapshot: states.append(copy.deepcopy(snapshot())))
    assert updated == [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16]
    assert inverted == [0, 2, 4, 8, 12, 16]
    inverted.clear()
    train(run, data, resume=states[1])
    assert inverted == [12, 16]


@pytest.mark.slow
def test_compiled_model_trains_like_the_plain_one():
    torch.set_default_dtype(torch.float32)
    dataset, data = digits(300)
    hyper = {"learning_rate": 1e-3, "factor_interval": 2}
    run = make_run(dataset, optimizer="kfac", batch_size=16, hyper=hyper)
    plain, compiled = train(run, data), train(run.model_copy(update={"compile": True}), data)
    assert compiled.last.train_loss == pytest.approx(plain.last.train_loss, rel=1e-3)
