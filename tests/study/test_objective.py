"""The one order of trials: hits by their times, misses by how near they came, diverged ones last."""

from itertools import pairwise
from math import inf, isfinite, nan
from typing import Any

import numpy as np
import pytest

from lbstudy.study.objective import objective, sort_key, time_so_far, worst
from lbstudy.study.run import Target
from lbstudy.study.spec import Tuning

STEPS = Tuning(trials=1, metric="steps_to_target", target={"val_accuracy": 0.7})
LOSS = Tuning(trials=1, metric="seconds_to_target", target={"val_loss": 0.5})


def random_trials(tuning: Tuning, count: int, draw: np.random.Generator) -> list[tuple[dict[str, Any], str]]:
    """Reports of trials' ends, with how they ended."""
    trials: list[tuple[dict[str, Any], str]] = []
    for kind in draw.choice(["hit", "miss", "blind", "diverged"], count, p=[0.5, 0.35, 0.05, 0.1]):
        # times from milliseconds to years, distances from next to nothing to all there is
        time, gap = 10 ** draw.uniform(-3, 8.9), 10 ** draw.uniform(-9, 0)
        nearest = 0.7 * (1 - gap) if tuning is STEPS else 0.5 / (1 - min(gap, 1 - 1e-9))
        report = {"hit": {tuning.metric: time, "nearest": 0.7 if tuning is STEPS else 0.4}, "blind": {}}.get(
            kind, {"nearest": nearest}
        )
        trials.append((report, "diverged" if kind == "diverged" else "completed"))
    return trials


def rank(tuning: Tuning, report: dict[str, Any], outcome: str) -> tuple[float, ...]:
    """The order that is meant, in words of its own: what is smaller is better."""
    if outcome == "diverged":
        return (2,)
    if tuning.metric in report:
        return (0, report[tuning.metric])
    near = report.get("nearest")
    if near is None:
        return (1, inf)
    return (1, 0.7 - near if tuning is STEPS else near - 0.5)


@pytest.mark.parametrize("tuning", [STEPS, LOSS])
def test_its_order_is_the_order_that_is_meant(tuning: Tuning):
    trials = random_trials(tuning, 500, np.random.default_rng(0))
    values = [objective(tuning, *trial) for trial in trials]
    assert all(map(isfinite, values))
    meant = sorted(range(500), key=lambda n: rank(tuning, *trials[n]))
    for before, after in pairwise(meant):
        ranks = rank(tuning, *trials[before]), rank(tuning, *trials[after])
        if ranks[0][0] != ranks[1][0] or ranks[1] > ranks[0]:
            assert values[before] <= values[after]
        if ranks[0][0] != ranks[1][0]:
            assert values[before] < values[after]
    completed = [n for n in meant if trials[n][1] == "completed"]
    keys = [sort_key(tuning, trials[n][0]) for n in completed]
    assert keys == sorted(keys)


@pytest.mark.parametrize("tuning", [STEPS, LOSS])
def test_a_trial_only_gets_better_while_it_trains(tuning: Tuning):
    draw = np.random.default_rng(1)
    seen = (
        np.minimum.accumulate(0.6 + draw.random(50))
        if tuning is LOSS
        else np.maximum.accumulate(0.69 * draw.random(50))
    )
    values = [objective(tuning, {"nearest": float(near)}, None) for near in seen]
    assert values == sorted(values, reverse=True)
    assert objective(tuning, {"nearest": None}, None) >= values[0]
    assert objective(tuning, {"nearest": float(seen[-1]), tuning.metric: 1e6}, "completed") < values[-1]
    assert objective(tuning, {"nearest": float(seen[-1])}, "diverged") == worst(tuning) > values[0]


@pytest.mark.parametrize("missing", [{}, {"steps_to_target": None}, {"steps_to_target": nan}, {"steps_to_target": inf}])
def test_a_time_that_is_not_there_is_a_miss(missing: dict[str, Any]):
    assert sort_key(STEPS, missing | {"nearest": 0.35}) == 9.5
    assert sort_key(STEPS, missing | {"nearest": nan}) == 10


def test_accuracy_and_loss_are_as_ever():
    accuracy, loss = Tuning(trials=1), Tuning(trials=1, metric="val_loss", direction="minimize")
    assert objective(accuracy, {"val_accuracy": 0.8}, "completed") == 0.8
    assert [objective(t, {}, "diverged") for t in (accuracy, loss)] == [0, 100]
    assert objective(loss, {"val_loss": 1e9}, None) == 100
    assert sort_key(accuracy, {"val_accuracy": 0.8}) == -0.8
    assert sort_key(loss, {"val_loss": 1e9}) == 1e9
    assert time_so_far(accuracy, {"step": 4}) is None


@pytest.mark.parametrize(("metric", "time"), [("steps", 1000), ("epochs", 10), ("seconds", 100)])
def test_the_time_so_far_is_in_the_unit_of_the_target(metric: str, time: float):
    tuning = Tuning(trials=1, metric=f"{metric}_to_target", target={"train_loss": 0.1})
    found = time_so_far(tuning, {"step": 1000, "epoch": 10, "run_seconds": 100.0})
    assert found == objective(tuning, {f"{metric}_to_target": time}, "completed")


def test_targets():
    assert str(Target(val_accuracy=0.7)) == "validation accuracy 0.7"
    assert Target(train_loss=0.1).measured == "clean_train_loss"
    assert [Target(val_loss=0.5).is_met(value) for value in (0.4, 0.5, 0.6, nan)] == [True, True, False, False]
    assert [Target(val_accuracy=0.5).is_met(value) for value in (0.4, 0.5, 0.6, nan)] == [False, True, True, False]
    assert Target.model_validate(Target(val_loss=0.5).model_dump()) == Target(val_loss=0.5)
