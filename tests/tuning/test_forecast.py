"""What a study costs, of known costs of its runs, against closed forms."""

from math import ceil, isclose, sqrt

import pytest

from lbstudy.study.spec import StudySpec
from lbstudy.tuning.forecast import DRAWS, Forecast, forecast
from lbstudy.tuning.measure import Cost, Measured, kinds
from tests.conftest import tiny_study

STARTING, BETWEEN, FIRST, EPOCH, CONFIRMED = 30.0, 0.5, 5.0, 2.0, 3.0


def made_up(
    study: StudySpec, epochs: float = 10, lanes: int = 1, confirmed: bool = False, device_memory: int = 0
) -> Forecast:
    costs = {cell.name: Cost(cell.name, FIRST, EPOCH, CONFIRMED, 100.0, device_memory) for cell in study.list_cells()}
    measured = Measured(costs, {}, STARTING, BETWEEN, 0, "1 x cpu", 0.0)
    return forecast(study, measured, dict.fromkeys(costs, epochs), lanes, confirmed)


def plain(trials: int, **asha: float) -> StudySpec:
    pruner = {"name": "asha", **asha} if asha else "none"
    return tiny_study(tuning={"trials": trials, "pruner": pruner})


@pytest.mark.parametrize("confirmed", [False, True])
def test_without_a_pruner_one_lane_takes_the_sum(confirmed: bool):
    found = made_up(plain(trials=3), epochs=10, confirmed=confirmed)
    runs = 4 * 3 * 10 * (CONFIRMED if confirmed else EPOCH)
    assert found.wall == pytest.approx(STARTING + 12 * BETWEEN + 4 * (FIRST - EPOCH) + runs)
    assert found.runs == pytest.approx(runs)
    assert set(found.shares.values()) == {1.0}


def test_on_gpus_every_trial_has_a_first_epoch():
    found = made_up(plain(trials=3), device_memory=1 << 30)
    assert found.wall == pytest.approx(STARTING + 12 * (BETWEEN + FIRST - EPOCH + 10 * EPOCH))


@pytest.mark.parametrize("lanes", [2, 5, 12, 20])
def test_the_last_lanes_have_the_rest(lanes: int):
    """Twelve equal trials; a lane pays for a first epoch once for each kind that it meets."""
    found = made_up(plain(trials=3), lanes=lanes)
    trial = BETWEEN + 10 * EPOCH
    rounds = ceil(12 / lanes)
    assert STARTING + rounds * trial < found.wall <= STARTING + rounds * (trial + FIRST - EPOCH)


def test_a_budget_in_steps_may_end_within_an_epoch():
    assert made_up(plain(trials=1), epochs=0.25).runs == pytest.approx(4 * 0.25 * EPOCH)


def passing(trials: int, reduction: float) -> float:
    """How many of a cell's trials pass one rung, expected, where each is at it before the next one begins.

    The cutoff for the one after m others is their (1 - 1/R) quantile, which of m uniform numbers has the mean
    (h + 1) / (m + 1) with h = (1 - 1/R) (m - 1): linear interpolation between order statistics.
    """
    return 1 + sum(1 - ((1 - 1 / reduction) * (m - 1) + 1) / (m + 1) for m in range(1, trials))


@pytest.mark.parametrize(("trials", "reduction"), [(4, 3), (30, 3), (60, 2)])
def test_asha_lets_as_many_pass_as_its_rule_does_on_average(trials: int, reduction: float):
    found = made_up(plain(trials, grace_period=1, reduction_factor=reduction), epochs=reduction)  # one rung: after 1
    share = (trials + passing(trials, reduction) * (reduction - 1)) / (trials * reduction)
    mean = sum(found.shares.values()) / len(found.shares)
    error = sqrt(trials * 0.25) * (reduction - 1) / (trials * reduction) / sqrt(DRAWS * len(found.shares))
    assert abs(mean - share) < 4 * error
    assert isclose(found.runs, sum(found.by_cell.values()))


def test_what_costs_the_same_is_measured_once():
    study = tiny_study(published=[], cells={
        "optimizer": ["sgd", "kfac"], "batch_size": [32], "smoothing": ["none"],
        "fixed.weight_decay": [0.0001, 0.001], "fixed.inverse_interval": [1, 10],
        "budget": {"short": {"epochs": 2}, "long": {"epochs": 3}},
    }, search={"learning_rate": {"log_uniform": [1e-3, 1e-1]}}, fixed={"damping": 0.1})  # fmt: skip
    found = [
        {(cell.optimizer, dict(cell.factors)["fixed.inverse_interval"]) for cell in cells} for cells in kinds(study)
    ]
    assert found == [{("sgd", 1), ("sgd", 10)}, {("kfac", 1)}, {("kfac", 10)}]
    assert sum(map(len, kinds(study))) == len(study.list_cells()) == 16
