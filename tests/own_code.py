"""A study of a user's own methods, as small as they come: its file has 9 lines, its code 37."""

MINE = """\
import torch
from torch import nn
from torch.nn import functional as F

from lbstudy.methods.smoothing import Smoothing


def network(shape, classes, width=4):
    channels, height, side = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class SignMomentum(torch.optim.Optimizer):
    def __init__(self, parameters, lr, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "mean" not in state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.add_(state["mean"].sign(), alpha=-group["lr"])


class SoftLabels(Smoothing):
    label = "soft labels"

    def cross_entropy(self, logits, labels, reduction):
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.1)
"""

STUDY = """\
name: own
code: [mine.py]
model: {name: "mine:network", width: 3}
dataset: {name: synthetic, samples: 320}
budget: {epochs: 2}
cells: {optimizer: ["mine:SignMomentum"], batch_size: [32], smoothing: [none, "mine:SoftLabels"]}
search: {learning_rate: {log_uniform: [1e-3, 1e-2]}}
tuning: {trials: 2}
precision: fp64
"""
