"""Products, eigenvalues, trace and density against the exact Hessian of a small network, and against curvlinops."""

import copy

import numpy as np
import pytest
import torch
from curvlinops import HessianLinearOperator
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lbstudy.analysis.minima import objective
from lbstudy.analysis.minima.hessian import lanczos, spectral_density, top_eigenvalues, trace
from lbstudy.analysis.minima.objective import Objective
from lbstudy.parallel.batch_norm import BatchNorm

Case = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """A network with every kind of layer in use, in training mode, and samples; float64."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), BatchNorm(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model, torch.randn(30, 2, 6, 6, dtype=torch.float64), torch.randint(4, (30,))


@pytest.fixture(scope="module")
def exact(case: Case) -> np.ndarray:
    """The Hessian of the mean cross-entropy in evaluation mode, entry by entry."""
    model, inputs, labels = copy.deepcopy(case[0]).eval(), *case[1:]
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes.values()])
        parameters = {n: piece.reshape(s) for (n, s), piece in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def curvlinops_hessian(case: Case) -> LinearOperator:
    model = copy.deepcopy(case[0]).eval()
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [case[1:]], check_deterministic=False
    ).to_scipy()  # fmt: skip


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def columns(operator: LinearOperator) -> np.ndarray:
    return np.stack([operator @ unit for unit in np.eye(operator.shape[0])], axis=1)


@pytest.mark.parametrize("kept", [0, 40_000, 1 << 30])
def test_products_are_those_of_the_exact_hessian(case: Case, exact: np.ndarray, kept: int, monkeypatch):
    monkeypatch.setattr(objective, "KEPT_GRAPHS", kept)  # no batch's graph, some batches' and all
    hessian = Objective(*case, batch_size=7).hessian()
    for _ in range(2):
        np.testing.assert_allclose(columns(hessian), exact, atol=1e-12)
    np.testing.assert_allclose(columns(curvlinops_hessian(case)), exact, atol=1e-12)


def test_weights_only_is_a_block_of_the_hessian(case: Case, exact: np.ndarray):
    weights = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in case[0].parameters()])
    hessian = Objective(*case, include="weights").hessian()
    np.testing.assert_allclose(columns(hessian), exact[np.ix_(weights, weights)], atol=1e-12)


def test_float32_products_are_good_to_float32(case: Case, exact: np.ndarray):
    model, inputs, labels = case
    hessian = Objective(copy.deepcopy(model).float(), inputs.float(), labels, batch_size=7).hessian()
    np.testing.assert_allclose(columns(hessian), exact, atol=1e-5 * np.abs(exact).max())


def test_value_and_gradient(case: Case):
    model, inputs, labels = copy.deepcopy(case[0]).eval(), *case[1:]
    mine = Objective(*case, batch_size=7)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    value, gradient = mine.value_and_gradient(mine.x)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert mine.value(mine.x) == value
    np.testing.assert_allclose(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-13)


def test_mini_batches_average_to_the_whole(case: Case):
    whole = Objective(*case, batch_size=7)
    parts = whole.mini_batches(10)
    assert [len(part) for part in parts] == [10, 10, 10]
    assert np.mean([part.value(whole.x) for part in parts]) == pytest.approx(whole.value(whole.x), rel=1e-12)
    assert [len(part) for part in whole.mini_batches(8)] == [8, 8, 8]  # 6 are left over
    assert [len(part) for part in whole.mini_batches(64)] == [30]


def test_top_eigenvalues_are_exact(case: Case, exact: np.ndarray):
    found, vectors = top_eigenvalues(Objective(*case).hessian(), 5, draw(), tolerance=0)
    expected = np.linalg.eigvalsh(exact)[::-1][:5]
    np.testing.assert_allclose([e.value for e in found], expected, rtol=1e-6)
    np.testing.assert_allclose(exact @ vectors, vectors * expected, atol=1e-6)
    theirs, _ = top_eigenvalues(curvlinops_hessian(case), 5, draw(7), tolerance=0)
    np.testing.assert_allclose([e.value for e in found], [e.value for e in theirs], rtol=1e-6)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_residuals_bound_the_error_of_eigenvalues(tolerance: float):
    q = np.linalg.qr(draw(5).standard_normal((400, 400)))[0]
    values = np.sort(draw(6).standard_normal(400))[::-1]  # a dense spectrum: hard to converge
    found, _ = top_eigenvalues(aslinearoperator((q * values) @ q.T), 4, draw(), tolerance)
    errors = [np.abs(values - estimate.value).min() for estimate in found]
    assert all(error <= estimate.error for error, estimate in zip(errors, found, strict=True))
    assert max(estimate.error for estimate in found) > 1e-9  # not converged: there is something to bound


def test_largest_means_most_positive():
    found, _ = top_eigenvalues(aslinearoperator(np.diag([-9.0, -8, 0, 1, 2, 3])), 2, draw())
    assert [e.value for e in found] == pytest.approx([3, 2])
    with pytest.raises(ValueError, match="6 eigenvalues of 6 parameters"):
        top_eigenvalues(aslinearoperator(np.eye(6)), 6, draw())


def test_trace_by_unit_vectors_is_exact(case: Case, exact: np.ndarray):
    value, error = trace(Objective(*case).hessian(), len(exact), draw())
    assert value == pytest.approx(np.trace(exact), rel=1e-6)
    assert value == pytest.approx(np.trace(columns(curvlinops_hessian(case))), rel=1e-6)
    assert error == 0


def test_traces_error_is_its_standard_deviation(exact: np.ndarray):
    operator, n = aslinearoperator(exact), len(exact)
    pairs = top_eigenvalues(operator, 5, draw(), tolerance=0)
    projector = np.eye(n) - pairs[1] @ pairs[1].T
    for eigenpairs, rest in ((None, exact), (pairs, projector @ exact @ projector)):
        estimates = [trace(operator, 16, draw(seed), eigenpairs) for seed in range(300)]
        values, errors = np.array(estimates).T
        sd = np.sqrt(2 * ((rest**2).sum() - (np.diag(rest) ** 2).sum()) / 16)  # of Rademacher vectors, in closed form
        assert np.mean(values) == pytest.approx(np.trace(exact), abs=4 * sd / np.sqrt(300))
        assert np.std(values) == pytest.approx(sd, rel=0.15)
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(sd, rel=0.15)
    assert sd < 0.5 * np.sqrt(2 * ((exact**2).sum() - (np.diag(exact) ** 2).sum()) / 16)  # what the eigenpairs are for


def test_a_trace_needs_probes():
    with pytest.raises(ValueError, match="1 probes"):
        trace(aslinearoperator(np.eye(6)), 1, draw())


def test_density_integrates_to_one_and_has_its_moments(case: Case, exact: np.ndarray):
    density = spectral_density(Objective(*case).hessian(), 3, 8, draw(4))
    grid = density.grid()
    heights = density.at(grid)
    assert (heights >= 0).all()
    assert np.trapezoid(heights, grid) == pytest.approx(1, abs=1e-4)
    starts, n = draw(4), len(exact)
    probes = np.stack([starts.choice([-1.0, 1.0], size=n) for _ in range(3)])
    for order in range(1, 5):  # quadrature is exact for the very start vectors
        power = np.linalg.matrix_power(exact, order)
        assert density.moment(order) == pytest.approx(np.mean([z @ power @ z / n for z in probes]), rel=1e-9)
    assert np.trapezoid(heights * grid, grid) == pytest.approx(density.moment(1), abs=1e-4)
    assert np.trapezoid(heights * grid**2, grid) == pytest.approx(density.moment(2) + density.width**2, rel=1e-3)


def test_density_has_the_moments_of_the_spectrum(exact: np.ndarray):
    n = len(exact)
    density = spectral_density(aslinearoperator(exact), 400, 3, draw())
    for order in (1, 2):
        power = np.linalg.matrix_power(exact, order)
        sd = np.sqrt(2 * ((power**2).sum() - (np.diag(power) ** 2).sum()) / 400) / n
        assert density.moment(order) == pytest.approx(np.trace(power) / n, abs=4 * sd)


def test_density_of_known_spectra():
    values = np.repeat([-1.0, 0.0, 5.0], [20, 60, 20])
    q = np.linalg.qr(draw(2).standard_normal((100, 100)))[0]
    density = spectral_density(aslinearoperator((q * values) @ q.T), 200, 10, draw())  # the Krylov space ends at 3
    assert len(density.nodes) == 600
    for eigenvalue, share in ((-1, 0.2), (0, 0.6), (5, 0.2)):
        mine = np.abs(np.array(density.nodes) - eigenvalue) < 1e-9
        assert np.array(density.weights)[mine].sum() == pytest.approx(share, abs=0.02)
    narrow = spectral_density(aslinearoperator(3 * np.eye(10)), 2, 5, draw())
    assert narrow.at(narrow.grid()).argmax() == pytest.approx(512, abs=1)
    assert narrow.moment(1) == pytest.approx(3)


def test_lanczos_returns_no_eigenvalue_twice():
    values = np.concatenate([np.linspace(0, 1, 77), [50, 100, 1000]])  # plain Lanczos gives copies of the last three
    diagonal, off_diagonal = lanczos(aslinearoperator(np.diag(values)), np.ones(80), 80)
    found = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    np.testing.assert_allclose(found, values, atol=1e-8)
