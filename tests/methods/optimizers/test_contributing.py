"""The optimizer that CONTRIBUTING.md writes is one: it is found as a module of the room is, and trains."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lbstudy.methods import optimizers
from tests.training.test_train import digits, make_run

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"


def test_a_new_optimizer_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "sign_descent.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    method = optimizers.get("sign_descent:METHOD")
    assert method.label == "sign descent"
    dataset, _ = digits(100)
    hyper = {"learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    model = nn.Linear(3, 2)
    before, gradient = model.weight.detach().clone(), torch.randn(2, 3)
    optimizer = optimizers.build(make_run(dataset, optimizer="sign_descent:METHOD", hyper=hyper), model)
    model.weight.grad, model.bias.grad = gradient, torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * (gradient.sign() + 0.01 * before))
    sys.modules.pop("sign_descent")
