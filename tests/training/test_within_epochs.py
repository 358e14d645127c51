"""Evaluations within epochs: training is as it was without them, and a run may end at its target."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lbstudy.methods import models
from lbstudy.study.run import RunSpec
from lbstudy.training.data import EpochImages
from lbstudy.training.train import EpochReport, Outcome, Snapshot, copy_of_state, evaluate, train
from tests.parallel import run_workers
from tests.training.test_battery import through_a_file
from tests.training.test_train import average_statistics, digits, make_run

SAMPLES = 80  # 64 of them train: 4 mini-batches of 16
NET = "tests.networks:small"  # with batch norm
FREE = "schedulefree:SGDScheduleFree"


def runs() -> dict[str, RunSpec]:
    dataset, _ = digits(SAMPLES, augment=["crop"])
    keys = {
        "model": NET, "precision": "fp64", "batch_size": 16, "batch_norm": {"ghost": 8}, "budget": {"epochs": 3},
        "evaluate_every": 3,
    }  # fmt: skip
    found = {
        "kfac, Mixup and noise": make_run(dataset, optimizer="kfac", smoothing="mixup+noise", **keys),
        "averages": make_run(dataset, smoothing="ema", **keys),
        "cut short": make_run(dataset, **keys | {"budget": {"steps": 10}}),
    }
    if find_spec("schedulefree"):
        found["schedule-free"] = make_run(dataset, optimizer=FREE, hyper={"learning_rate": 0.5}, **keys)
    return found


def trained(run: RunSpec, resume_after: int = 0, **changes: object) -> tuple[Outcome, list[EpochReport]]:
    """The run, interrupted after an epoch if that is asked for, and its reports."""
    _, data = digits(SAMPLES, augment=["crop"])
    run = run.model_copy(update=changes)
    reports: list[EpochReport] = []
    kept: list[Snapshot] = []

    def on_epoch(report: EpochReport, snapshot: object) -> bool:
        reports.append(report)
        if report.epoch == resume_after:
            kept.append(through_a_file(snapshot()))  # type: ignore[operator]
        return report.epoch == resume_after

    outcome = train(run, data, on_epoch=on_epoch)
    if kept:
        outcome = train(run, data, on_epoch=lambda report, _: bool(reports.append(report)), resume=kept[0])
    return outcome, reports


def found_within(reports: list[EpochReport]) -> list[tuple[float, ...]]:
    """Step, loss and accuracy of every evaluation within epochs."""
    return [(e["step"], e["val_loss"], e["val_accuracy"]) for report in reports for e in report.within or []]


@pytest.mark.parametrize("name", runs())
def test_evaluating_changes_nothing_and_survives_an_interruption(name: str):
    run = runs()[name]
    (plain, without), (watched, reports) = trained(run, evaluate_every=None), trained(run)
    assert watched.fingerprint == plain.fingerprint
    assert [r.val_loss for r in reports] == [r.val_loss for r in without]
    assert all(report.within is None for report in without)
    interrupted, again = trained(run, resume_after=1)
    assert interrupted.fingerprint == plain.fingerprint
    assert found_within(again) == found_within(reports)
    assert [step for step, *_ in found_within(reports)] == [3, 6, 9]  # not 12, where an epoch ends


def across_workers(names: list[str]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(found_within(trained(runs()[name])[1]), dtype=torch.float64) for name in names}


@pytest.mark.long
def test_workers_agree_within_epochs():
    names = [name for name in runs() if name != "schedule-free"]
    one, two = across_workers(names), run_workers(2, across_workers, names)
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_an_evaluation_within_is_that_of_the_run_that_ends_there():
    """Its epoch is its last one then, cut short by the budget."""
    dataset, data = digits(SAMPLES)
    run = make_run(dataset, batch_size=16, budget={"epochs": 2}, evaluate_every=3)
    assert len(found_within(trained(run)[1])) == 2
    for found in found_within(trained(run)[1]):
        last = train(run.model_copy(update={"budget": run.budget.model_copy(
            update={"epochs": None, "steps": int(found[0])})}), data).last  # fmt: skip
        assert (last.step, last.val_loss, last.val_accuracy) == pytest.approx(found, rel=1e-12)


def test_statistics_reach_back_into_the_epoch_before(monkeypatch: pytest.MonkeyPatch):
    """After the first mini-batch of the second epoch: of that and of the last three of the first, in ghosts of 8."""
    dataset, data = digits(SAMPLES, augment=["crop"])
    seen: list[dict[str, torch.Tensor]] = []

    def look(model: nn.Module, *rest: object) -> tuple[float, float]:
        seen.append(copy_of_state(model))
        return evaluate(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("lbstudy.training.train.evaluate", look)
    keys = {"model": NET, "batch_norm": {"ghost": 8}, "batch_size": 16, "precision": "fp64"}
    run = make_run(dataset, budget={"epochs": 2}, evaluate_every=5, **keys)
    train(run, data)
    after_epoch, within, _ = seen
    first, second = (EpochImages(data, dataset, run.seed, epoch, torch.float64) for epoch in (1, 2))
    parts = [(second, start) for start in (0, 8)] + [(first, start) for start in range(16, 64, 8)]
    theirs = models.build(NET, data.shape, data.classes).double()
    theirs.load_state_dict(within)
    expected = average_statistics(theirs, [images.images(torch.arange(at, at + 8)) for images, at in parts])
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(within[name], value, msg=name)
        assert not torch.allclose(after_epoch[name], value), name


class TestTarget:
    """A run ends at the first evaluation that meets its target."""

    def reports(self, metric: str, value: float, **changes: object) -> list[EpochReport]:
        dataset, _ = digits(SAMPLES, augment=["crop"])
        keys = {"batch_size": 16, "budget": {"epochs": 4}, "evaluate_every": 3, "precision": "fp64"}
        run = make_run(dataset, target={metric: value}, **keys | changes)
        outcome, found = trained(run)
        assert outcome.last == found[-1]
        return found

    @pytest.mark.parametrize("metric", ["val_accuracy", "val_loss", "train_loss"])
    @pytest.mark.parametrize("model", ["lenet5", NET])
    def test_where_it_is_met_first(self, metric: str, model: str):
        keys = {"model": model}
        key = "clean_train_loss" if metric == "train_loss" else metric
        whole = self.reports(metric, 1.0 if metric == "val_accuracy" else 1e-6, **keys)
        assert whole[-1].steps_to_target is None
        series = [e for r in whole for e in (*(r.within or []), {"step": r.step, key: getattr(r, key)})]
        best = max if metric == "val_accuracy" else min
        assert whole[-1].nearest == best(e[key] for e in series)
        value = series[len(series) // 2][key]
        first = next(e for e in series if (e[key] >= value if metric == "val_accuracy" else e[key] <= value))
        ended = self.reports(metric, value, until_target=True, **keys)
        assert ended[-1].step == ended[-1].steps_to_target == first["step"]
        assert ended[-1].epochs_to_target == first["step"] / 4
        assert getattr(ended[-1], key) == first[key]  # to the bit: the report is the evaluation that met it
        assert ended[-1].seconds_to_target == pytest.approx(sum(r.seconds for r in ended), abs=0.5)
        going_on = self.reports(metric, value, **keys)
        assert going_on[-1].epoch == whole[-1].epoch
        assert going_on[-1].steps_to_target == first["step"]

    def test_an_interrupted_run_remembers_how_near_it_came(self):
        dataset, _ = digits(SAMPLES)
        keys = {"batch_size": 16, "budget": {"epochs": 3}, "evaluate_every": 3, "target": {"val_accuracy": 1.0}}
        run = make_run(dataset, hyper={"learning_rate": 0.3}, **keys)
        one, two = trained(run)[1], trained(run, resume_after=2)[1]
        assert [r.nearest for r in two] == [r.nearest for r in one]
        assert two[-1].run_seconds == pytest.approx(sum(r.seconds for r in two), rel=0.01)
