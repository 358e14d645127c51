"""K-FAC in networks of many kinds of layers: tokens, layers that are used twice, and layers it has no block for."""

import copy
from typing import Any

import pytest
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.optimizers.kfac import KFAC
from tests.methods.optimizers.test_kfac import CLASSES, kfac, observe, samples, take_step
from tests.methods.optimizers.test_kfac import _float64 as _float64


def oracle(model: nn.Module, parameters: list[nn.Parameter], inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """Directions of curvlinops' K-FAC on some parameters alone, with their gradients as they are."""
    operator = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(inputs, labels)], fisher_type="empirical", kfac_approx="expand",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    inverse = KFACInverseLinearOperator(operator, damping=1e-2, use_heuristic_damping=True)
    return inverse @ [p.grad.clone() for p in parameters]


def assert_directions(optimizer: KFAC, expected: dict[nn.Parameter, Tensor]) -> None:
    """Of these parameters; all others' are their gradients."""
    for p, mine in zip(optimizer.param_groups[0]["params"], take_step(optimizer), strict=True):
        plain = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(mine, expected.get(p, plain), rtol=0, atol=1e-9)


def assert_preconditioned(optimizer: KFAC, known: list[nn.Parameter]) -> None:
    """These parameters and no others; where the oracle cannot know the directions, since labels are drawn."""
    steps = dict(zip(optimizer.param_groups[0]["params"], take_step(optimizer), strict=True))
    others = {p: d for p, d in steps.items() if p.grad is not None and torch.allclose(d, p.grad, rtol=0, atol=1e-12)}
    frozen = {p for p in steps if p.grad is None}
    assert set(steps) - set(others) - frozen == set(known)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


def mobile() -> nn.Sequential:
    """A block of MobileNet and ConvNeXt: known layers are 0, 5 (on tokens) and 8."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), ChannelsLast(), nn.LayerNorm(4),
        nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 5 * 4, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
def test_layers_without_a_block_take_the_gradient(fisher: str):
    model, (images, labels) = mobile(), samples()
    optimizer = kfac(model, damping=1e-2, fisher=fisher)
    assert optimizer.plain_layers == ["1 (Conv2d, groups=4)", "2 (GroupNorm)", "4 (LayerNorm)"]
    observe(optimizer, model, images, labels)
    known = [p for i in (0, 5, 8) for p in model[i].parameters()]
    if fisher == "empirical":
        assert_directions(optimizer, dict(zip(known, oracle(model, known, images, labels), strict=True)))
    else:
        assert_preconditioned(optimizer, known)
    assert len(optimizer.plain_layers) == 3


class Tokens(nn.Module):
    """Linear layers on the columns of an image, N x T x D, or with `transposed` on T x N x D."""

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(18, 5), nn.Linear(5, 4, bias=False)
        self.head, self.transposed = nn.Linear(4, CLASSES), transposed

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(1, 2).mT
        if self.transposed:
            return self.head(self.second(self.first(tokens.transpose(0, 1)).tanh()).tanh().mean(0))
        return self.head(self.second(self.first(tokens).tanh()).tanh().mean(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_count_as_independent(transposed: bool):
    model, (images, labels) = Tokens(), samples()
    mine = Tokens(transposed)
    mine.load_state_dict(model.state_dict())
    optimizer = kfac(mine, damping=1e-2)
    for part in (slice(0, 5), slice(5, 12)):
        with optimizer.capture(12, part, last=part.stop == 12):
            (F.cross_entropy(mine(images[part]), labels[part], reduction="sum") / 12).backward()
    F.cross_entropy(model(images), labels).backward()
    expected = oracle(model, list(model.parameters()), images, labels)
    assert_directions(optimizer, dict(zip(mine.parameters(), expected, strict=True)))


class Twice(nn.Module):
    """A linear layer or convolution on the left and the right half of an image, one after the other or both at once."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, apart: bool):
        super().__init__()
        self.layer, self.apart = copy.deepcopy(layer), apart
        torch.manual_seed(1)
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        halves = [images[..., :4], images[..., 4:]]
        if isinstance(self.layer, nn.Linear):
            halves = [half.flatten(1) for half in halves]
            found = [self.layer(h) for h in halves] if self.apart else self.layer(torch.stack(halves, 1)).unbind(1)
        else:
            found = [self.layer(h) for h in halves] if self.apart else self.layer(torch.cat(halves, 2)).chunk(2, 2)
        return self.head(torch.cat([f.flatten(1).tanh() * (i + 1) for i, f in enumerate(found)], 1))


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
@pytest.mark.parametrize("layer", [nn.Linear(72, 5), nn.Conv2d(2, 5, 1)], ids=["linear", "convolution"])
def test_a_layer_that_is_used_twice_is_used_at_twice_as_many_positions(layer: nn.Module, fisher: str):
    images, labels = samples()
    steps = []
    for apart in (True, False):
        model = Twice(layer.to(images.dtype), apart)
        model(images)  # settles the head's size
        torch.manual_seed(2)
        nn.init.normal_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        optimizer = kfac(model, damping=1e-2, fisher=fisher)
        assert not optimizer.plain_layers
        observe(optimizer, model, images, labels)
        steps.append(take_step(optimizer))
    for mine, its in zip(*steps, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)


class Transformer(nn.Module):
    """Weights that are used without calling their layer, shared between layers, computed, frozen or of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 18))
        self.attention, self.mix = nn.MultiheadAttention(18, 2, batch_first=True), nn.Linear(18, 18)
        self.tied, self.twin = nn.Linear(18, 18, bias=False), nn.Linear(18, 18)
        self.twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(18, 18, bias=False))
        self.frozen = nn.Linear(18, 18).requires_grad_(False)
        self.head = nn.Linear(18, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1, 2).mT + self.token
        x = self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(x, self.mix.weight, self.mix.bias).tanh()
        return self.head(self.frozen(self.normed(self.twin(self.tied(x)))).mean(1))


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
def test_weights_that_no_layer_of_their_own_applies_take_the_gradient(fisher: str):
    model, (images, labels) = Transformer(), samples()
    optimizer = kfac(model, damping=1e-2, fisher=fisher, inverse_interval=2)
    always = [
        "the model itself (Transformer)", "attention (MultiheadAttention)",
        "attention.out_proj (NonDynamicallyQuantizableLinear)", "tied (Linear, shared parameters)",
        "twin (Linear, shared parameters)", "normed.parametrizations.weight (ParametrizationList)",
    ]  # fmt: skip
    assert optimizer.plain_layers == always
    for _ in range(3):
        model.zero_grad()
        observe(optimizer, model, images, labels)
        known = list(model.head.parameters())
        if fisher == "empirical":
            assert_directions(optimizer, dict(zip(known, oracle(model, known, images, labels), strict=True)))
        else:
            assert_preconditioned(optimizer, known)
        assert optimizer.plain_layers == [*always, "mix (Linear, not called)"]
    resumed = kfac(model, inverse_interval=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.plain_layers == optimizer.plain_layers


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Renamed(nn.Conv2d):
    """Another way to start, the same layer."""


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "Conv2d, groups=2"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), "Conv2d, padding_mode='circular'"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.BatchNorm2d(4), "BatchNorm2d"),
        (nn.Embedding(4, 4), "Embedding"),
        (Scaled(4, 4), "Scaled"),
        (Renamed(4, 4, 3), None),
    ],
)
def test_which_layers_have_a_block(layer: nn.Module, kind: str | None):
    found = kfac(nn.Sequential(layer, nn.Linear(4, 4))).plain_layers
    assert found == ([f"0 ({kind})"] if kind else [])


@pytest.mark.parametrize("keys", [{}, {"batch_norm": "plain"}])
def test_a_model_without_any_block_is_refused(keys: dict[str, Any]):
    with pytest.raises(ValueError, match=r"convolutions without groups and batch norm, but Sequential has none"):
        kfac(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.LayerNorm(2)), **keys)
