"""Label smoothing (Szegedy et al. 2016): a share of every label goes to all classes alike."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lbstudy.methods.smoothing import Smoothing
from lbstudy.study.run import Spec


class Numbers(Spec):
    """Label smoothing's hyper-parameter."""

    label_smoothing: float = Field(gt=0, lt=1, description="share of each label that all classes get in equal parts")


class LabelSmoothing(Smoothing):
    """Cross-entropy with q'(k) = (1 - epsilon) q(k) + epsilon / K of K classes in place of q (section 7).

    The labels may be mixed ones, of Mixup or CutMix. The training loss on record is the smoothed one.
    """

    label = "label smoothing"
    source = "Szegedy et al. 2016"
    Numbers = Numbers

    def cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Loss of each sample, or summed, with smoothed labels."""
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=self.numbers.label_smoothing)


METHOD = LabelSmoothing
