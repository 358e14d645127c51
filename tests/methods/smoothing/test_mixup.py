"""Mixup against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbstudy.methods.smoothing import Combined, Inputs, Part
from lbstudy.methods.smoothing.mixup import Mixing, Mixup, Numbers, Settings, mix

CPU = torch.device("cpu")


def mixing(step: int = 0, samples: int = 64, alpha: float = 0.4, per: str = "mini_batch") -> Mixing:
    return mixup(alpha, per).draw(step, samples, CPU, torch.float64)


def mixup(alpha: float, per: str = "mini_batch") -> Mixup:
    return Mixup(nn.Linear(1, 1), Numbers(mixup_alpha=alpha), Settings.model_validate({"per": per}), seed=7)


class TestMixup:
    def test_loss_is_cross_entropy_with_soft_labels(self):
        logits = torch.randn(64, 10, dtype=torch.float64)
        labels = torch.randint(10, (64,))
        draw = mixing(per="sample")
        partners = labels[draw.partners]
        lam = draw.coefficients[:, None]
        soft = lam * F.one_hot(labels, 10) + (1 - lam) * F.one_hot(partners, 10)
        inputs = Inputs(torch.empty(0), labels, partners, draw.coefficients)
        loss = Combined([mixup(0.4)]).loss_sum(logits, inputs)
        torch.testing.assert_close(loss, F.cross_entropy(logits, soft, reduction="sum"))

    def test_images_are_interpolated(self):
        x, y = torch.rand(2, 64, 3, 4, 4, dtype=torch.float64)
        lam = torch.rand(64, dtype=torch.float64)
        for i, mixed in enumerate(mix(x, y, lam)):
            torch.testing.assert_close(mixed, lam[i] * x[i] + (1 - lam[i]) * y[i])

    def test_one_coefficient_per_minibatch_or_per_sample(self):
        assert len(mixing().coefficients.unique()) == 1
        assert len(mixing(per="sample").coefficients.unique()) == 64
        assert sorted(mixing().partners.tolist()) == list(range(64))

    def test_draws_are_a_function_of_the_step(self):
        assert torch.equal(mixing(3).partners, mixing(3).partners)
        assert not torch.equal(mixing(3).partners, mixing(4).partners)

    def test_coefficients_follow_the_beta_distribution_unfolded(self):
        alpha = 0.4
        draws = torch.stack([mixing(step, samples=1, alpha=alpha).coefficients[0] for step in range(4000)])
        assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
        assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
        assert (draws < 0.5).double().mean().item() == pytest.approx(0.5, abs=0.03)  # not folded to [1/2, 1]

    def test_a_mini_batch_in_one_pass_is_that_in_several_to_the_bit(self):
        """In one pass the partners are taken from the samples that are there, and nothing is fetched twice."""
        images, labels = torch.rand(20, 3, 4, 4), torch.randint(10, (20,))
        fetched: list[int] = []

        def fetch(positions: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
            fetched.append(len(labels[positions]))
            return images[positions], labels[positions]

        def inputs(start: int, stop: int) -> Inputs:
            return mixup(0.4).inputs(Part(0, 20, slice(start, stop), fetch, CPU, torch.float32))

        whole = inputs(0, 20)
        assert fetched == [20]
        for ours, *parts in zip(whole, inputs(0, 9), inputs(9, 20), strict=True):
            assert torch.equal(ours, torch.cat(parts))
        assert fetched == [20, 9, 9, 11, 11]
