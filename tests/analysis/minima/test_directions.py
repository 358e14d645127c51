"""Random directions: their law, their scale, and what they depend on."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import cross_entropy

from lbstudy.analysis.minima.directions import DirectionSpec, draw
from lbstudy.methods import models

CIFAR = (3, 32, 32)


def vgg9(seed: int = 0) -> nn.Module:
    """With parameters that are neither zero nor one anywhere."""
    torch.manual_seed(seed)
    model = models.build("vgg9", CIFAR, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vgg9()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def test_models_of_one_architecture_share_their_draws(model: nn.Module):
    spec = DirectionSpec(normalisation="none", biases_and_norms=True)
    ours, theirs = draw(model, spec, 3), draw(vgg9(1), spec, 3)
    assert ours.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_precision_does_not_change_a_draw():
    model = models.build("lenet5", CIFAR, 10)
    single = draw(model, DirectionSpec(), 0)
    double = draw(model.double(), DirectionSpec(), 0)
    for name in single:
        torch.testing.assert_close(single[name].double(), double[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("seed", "index"), [(1, 0), (0, 1)])
def test_another_seed_or_index_is_another_direction(model: nn.Module, seed: int, index: int):
    first, other = draw(model, DirectionSpec(), 0), draw(model, DirectionSpec(seed=seed), index)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert abs(cosine(first[name], other[name])) < 5 / parameter.numel() ** 0.5


def test_parameters_of_equal_shape_are_drawn_independently(model: nn.Module):
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for direction in draw(model, DirectionSpec(normalisation="none"), 0).values():
        if direction.ndim > 1:
            by_shape.setdefault(direction.shape, []).append(direction)
    twins = next(group for group in by_shape.values() if len(group) > 1)
    assert abs(cosine(*twins[:2])) < 5 / twins[0].numel() ** 0.5


def test_a_plain_direction_is_standard_normal(model: nn.Module):
    direction = draw(model, DirectionSpec(normalisation="none", biases_and_norms=True), 0)
    numbers = torch.cat([d.flatten() for d in direction.values()]).double()
    n = len(numbers)
    assert numbers.mean().item() == pytest.approx(0, abs=4 / n**0.5)
    assert numbers.var().item() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=4 * (96 / n) ** 0.5)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("normalisation", ["filter", "layer"])
def test_norms_are_those_of_the_weights(model: nn.Module, normalisation: str, everything: bool):
    direction = draw(model, DirectionSpec(normalisation=normalisation, biases_and_norms=everything), 0)
    for name, weights in model.named_parameters():
        if weights.ndim == 1 and not everything:
            assert not direction[name].any()
        elif weights.ndim > 1 and normalisation == "filter":
            for ours, theirs in zip(direction[name], weights, strict=True):
                assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4)
        else:
            assert direction[name].norm().item() == pytest.approx(weights.norm().item(), rel=1e-4)


@pytest.mark.parametrize("normalisation", ["filter", "layer", "none"])
def test_biases_are_moved_at_random_and_not_along_themselves(model: nn.Module, normalisation: str):
    """The trap of the original code: every tensor of one dimension became the weight itself."""
    direction = draw(model, DirectionSpec(normalisation=normalisation, biases_and_norms=True), 0)
    for name, weights in model.named_parameters():
        if weights.ndim == 1:
            assert abs(cosine(direction[name], weights)) < 5 / weights.numel() ** 0.5 or weights.numel() <= 10
            assert not torch.allclose(direction[name].abs(), weights.abs(), rtol=0.01)


def test_filters_of_zero_stay_where_they_are():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[1].zero_()
    direction = draw(model, DirectionSpec(), 0)["weight"]
    assert direction.isfinite().all()
    assert direction[1].tolist() == [0, 0, 0, 0]


def test_expected_curvature_is_a_sum_of_traces():
    """E[d^T H d] = sum over filters of ||w_f||^2 / n_f tr H_ff, for a filter's direction is uniform on a sphere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(weights, flat.split(sizes), strict=True))
        moved = {name: part.view_as(weights[name]) for name, part in parts.items()}
        return cross_entropy(torch.func.functional_call(model, moved, (inputs,)), labels)

    hessian = torch.func.hessian(loss)(torch.cat([w.flatten() for w in weights.values()]))
    filters = torch.cat(
        [w.norm(dim=1).square().div(w.shape[1]).repeat_interleave(w.shape[1]) for w in weights.values()]
    )
    expected = (filters * hessian.diagonal()).sum().item()

    directions = torch.stack(
        [torch.cat([draw(model, DirectionSpec(), index)[name].flatten() for name in weights]) for index in range(1000)]
    )
    curvatures = torch.einsum("di,ij,dj->d", directions, hessian, directions)
    error = curvatures.std().item() / len(curvatures) ** 0.5
    assert error < 0.1 * expected
    assert curvatures.mean().item() == pytest.approx(expected, abs=4 * error)


def test_a_spec_is_a_value_that_survives_json():
    spec = DirectionSpec(seed=3, normalisation="layer")
    assert DirectionSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="normalisation"):
        DirectionSpec(normalisation="weight")
