"""Label smoothing against cross-entropy with soft labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbstudy.methods.smoothing import Combined, Inputs
from lbstudy.methods.smoothing.label_smoothing import LabelSmoothing, Numbers
from lbstudy.study.run import Spec

LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS, OTHERS = torch.arange(40) % 7, torch.arange(40) % 5
SHARES = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def smoothed(labels: torch.Tensor, share: float) -> torch.Tensor:
    """(1 - epsilon) one-hot + epsilon / K."""
    soft = torch.full((40, 7), share / 7, dtype=torch.float64)
    soft[torch.arange(40), labels] += 1 - share
    return soft


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_loss_is_cross_entropy_with_smoothed_labels(share: float):
    loss = Combined([LabelSmoothing(nn.Linear(1, 1), Numbers(label_smoothing=share), Spec(), seed=0)])
    one = F.cross_entropy(LOGITS, smoothed(LABELS, share), reduction="sum")
    torch.testing.assert_close(loss.loss_sum(LOGITS, Inputs(torch.empty(0), LABELS)), one, rtol=1e-12, atol=0)
    mixed = SHARES[:, None] * smoothed(LABELS, share) + (1 - SHARES[:, None]) * smoothed(OTHERS, share)
    two = F.cross_entropy(LOGITS, mixed, reduction="sum")
    found = loss.loss_sum(LOGITS, Inputs(torch.empty(0), LABELS, OTHERS, SHARES))
    torch.testing.assert_close(found, two, rtol=1e-12, atol=0)
    assert not torch.isclose(one, F.cross_entropy(LOGITS, LABELS, reduction="sum"), rtol=1e-4)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_share_lies_between_nothing_and_all(share: float):
    with pytest.raises(ValueError, match="label_smoothing"):
        Numbers(label_smoothing=share)
