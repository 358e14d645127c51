"""Averaged weights against torch's AveragedModel, on a real run."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lbstudy.methods.smoothing.ema import ExponentialMovingAverage, Numbers
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.study.run import Spec
from lbstudy.training.data import EpochImages
from lbstudy.training.train import EpochReport, Snapshot, evaluate, train
from tests.training.test_train import digits, make_run

DECAY = 0.8


def ema_of(model: nn.Module) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(model, Numbers(ema_decay=DECAY), Spec(), seed=0)


def test_weights_are_swapped_back_to_the_bit():
    model = nn.Linear(30, 20)
    average = ema_of(model)
    first = model.weight.detach().clone()
    with average.averaged():
        assert torch.equal(model.weight, first)  # no step yet
    average.after_step(0)
    model.weight.data.mul_(1.7)
    average.after_step(1)
    second = model.weight.detach().clone()
    with average.averaged():
        torch.testing.assert_close(model.weight.detach(), DECAY * first + (1 - DECAY) * second)
    assert torch.equal(model.weight, second)
    with pytest.raises(ZeroDivisionError), average.averaged():
        raise ZeroDivisionError
    assert torch.equal(model.weight, second)


def test_evaluated_and_kept_models_are_torchs_averages():
    """A run of single steps gives the trained weights after every step; torch averages them."""
    dataset, data = digits(100)  # 80 train: 2 steps an epoch
    keys = {"model": "tests.networks:small", "batch_size": 40, "precision": "fp64", "evaluate": "all"}
    trained: list[nn.Module] = []
    for steps in range(1, 7):
        trained.append(train(make_run(dataset, smoothing="none", budget={"steps": steps}, **keys), data).model)
    theirs = AveragedModel(copy.deepcopy(trained[0]), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for model in trained:
        theirs.update_parameters(model)

    taken: list[tuple[EpochReport, Snapshot]] = []

    def keep(report: EpochReport, snapshot: Callable[[], Snapshot]) -> bool:
        taken.append((report, copy.deepcopy(snapshot())))
        return False

    run = make_run(dataset, smoothing="ema", hyper={"ema_decay": DECAY}, budget={"steps": 6}, **keys)
    outcome = train(run, data, on_epoch=keep)
    report, snapshot = taken[-1]
    for mine, average in zip(outcome.model.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, average, rtol=0, atol=1e-12)
    for name, parameter in trained[-1].named_parameters():  # the training knows nothing of it
        assert torch.equal(snapshot["model"][name], parameter)
        assert not torch.equal(snapshot["evaluated"][name], parameter)
    assert all(torch.equal(snapshot["evaluated"][n], t) for n, t in outcome.model.state_dict().items())

    # what is reported is the average's, with batch norm's statistics at the average
    last = EpochImages(data, dataset, run.seed, 3, torch.float64)
    inputs = torch.stack([last.images(torch.arange(start, start + 40)) for start in (0, 40)])
    oracle = theirs.module
    for layer, (mean, variance) in statistics(oracle, inputs).items():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    loss, accuracy = evaluate(oracle, data, data.validation, "fp64")
    assert report.val_loss == pytest.approx(loss, rel=1e-10)
    assert report.val_accuracy == accuracy
    best = next(r for r, s in taken if r.val_accuracy == max(r.val_accuracy for r, _ in taken))
    assert outcome.best is not None
    kept = next(s["evaluated"] for r, s in taken if r.epoch == best.epoch)
    assert all(torch.equal(outcome.best["model"][name], tensor) for name, tensor in kept.items())


@torch.no_grad()
def statistics(model: nn.Module, batches: torch.Tensor) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Means over the batches of each batch norm's mean and unbiased variance."""
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs: seen.setdefault(module, []).append(inputs[0].transpose(0, 1).flatten(1))
        )
        for layer in layers
    ]
    model.train()
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {
        layer: (torch.stack([v.mean(1) for v in values]).mean(0), torch.stack([v.var(1) for v in values]).mean(0))
        for layer, values in seen.items()
    }
