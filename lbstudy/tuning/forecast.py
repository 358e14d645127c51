"""What a study costs, of what its runs cost: its trials dealt to lanes as the search deals them, ended by its pruner.

Which trials ASHA ends depends on how good they turn out, and is simulated with the study's own pruner: the trials of a
cell come in random order of how good they are, and the better of two is so at every rung. ASHA is asynchronous, and the
first trial to reach a rung passes it, so that of few trials more pass than one in `reduction_factor`. A search that
learns hands out better trials later, more of which pass; trials that diverge end sooner. Neither is foreseen.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from lbstudy.parallel.randomness import derive_seed
from lbstudy.study.spec import StudySpec
from lbstudy.tuning.measure import Measured
from lbstudy.tuning.pruner import StudyPruner
from lbstudy.tuning.search import OBJECTIVE

DRAWS = 10
TRIALS = 5000
"""A forecast is the mean over DRAWS simulated studies, or fewer where these have more than TRIALS trials together."""


@dataclass(frozen=True)
class Forecast:
    """What a study's runs cost."""

    wall: float  # seconds, until the last one has ended; with the start of Ray and of the lanes
    by_cell: dict[str, float]  # seconds of training and evaluation of all runs of a cell
    shares: dict[str, float]  # cell -> epochs that its runs train, of all that they would without a pruner

    @property
    def runs(self) -> float:
        """Seconds of training and evaluation of all runs."""
        return sum(self.by_cell.values())


def forecast(
    study: StudySpec, measured: Measured, epochs: Mapping[str, float], lanes: int, confirmed: bool = False
) -> Forecast:
    """What a study's runs cost.

    Args:
        study: the study; its `tuning` says how many runs each cell gets and how they are pruned.
        measured: what an epoch costs, in all cells.
        epochs: of a whole run, by cell; a budget in steps may end within one.
        lanes: how many runs there are at a time.
        confirmed: the runs evaluate on all images, as confirmed ones do.
    """
    price = {name: cost.confirmed if confirmed else cost.epoch for name, cost in measured.costs.items()}
    by_chance = study.tuning.pruner != "none"
    count = max(1, min(DRAWS, TRIALS // (study.tuning.trials * len(epochs)))) if by_chance else 1
    draws = [_simulate(study, measured, price, epochs, lanes, draw) for draw in range(count)]
    trained = {name: fmean(of_cell[name] for _, of_cell in draws) for name in epochs}
    return Forecast(
        wall=fmean(wall for wall, _ in draws),
        by_cell={name: trained[name] * price[name] for name in epochs},
        shares={name: trained[name] / (study.tuning.trials * epochs[name]) for name in epochs},
    )


@dataclass
class _Trial:
    cell: str
    number: int
    quality: float  # its value at every rung
    stops: list[float]  # epochs at which it may end and has not been yet; the last one is its budget
    reached: float = 0.0

    def go_on(self) -> float:
        """To the next stop; returns the epochs that this takes."""
        before, self.reached = self.reached, self.stops.pop(0)
        return self.reached - before


@dataclass(order=True)
class _Lane:
    now: float  # when its trial reaches its next stop
    number: int
    trial: _Trial | None = field(default=None, compare=False)
    met: set[str] = field(default_factory=set, compare=False)  # kinds of runs that it has had


def _simulate(
    study: StudySpec, measured: Measured, price: Mapping[str, float], epochs: Mapping[str, float], lanes: int, draw: int
) -> tuple[float, dict[str, float]]:
    """One course of the study: when its last trial ends, and the epochs that the trials of each cell train."""
    chance = random.Random(derive_seed(study.seed, "forecast", draw))
    pruner = StudyPruner(study, {name: ceil(count) for name, count in epochs.items()}, [])
    waiting = iter([(name, number) for number in range(study.tuning.trials) for name in epochs])  # cells take turns
    rungs = {cell.name: study.rungs(cell, ceil(epochs[cell.name])) for cell in study.list_cells()}
    trained, end = dict.fromkeys(epochs, 0.0), 0.0
    queue = [_Lane(measured.starting, number) for number in range(lanes)]

    def known(trial: _Trial) -> Any:
        """The trial as the pruner knows it."""
        return SimpleNamespace(config={"cell": trial.cell, "number": trial.number})

    def is_over(trial: _Trial) -> bool:
        result = {"epoch": trial.reached, OBJECTIVE: trial.quality}
        return not trial.stops or pruner.on_trial_result(None, known(trial), result) == TrialScheduler.STOP

    while queue:
        lane = heapq.heappop(queue)
        if lane.trial is not None and is_over(lane.trial):
            trained[lane.trial.cell] += lane.trial.reached
            lane.trial, end = None, lane.now
        if lane.trial is None:
            name, number = next(waiting, ("", 0))
            if not name:
                continue  # this lane has nothing left to do
            lane.trial = _Trial(name, number, chance.random(), [*map(float, rungs[name]), epochs[name]])
            pruner.on_trial_add(None, known(lane.trial))
            lane.now += measured.between
            cost = measured.costs[name]
            if cost.measured not in lane.met or cost.device_memory:  # on GPUs passes are replayed after first epochs
                lane.met.add(cost.measured)
                lane.now += cost.first - cost.epoch
        lane.now += lane.trial.go_on() * price[lane.trial.cell]
        heapq.heappush(queue, lane)
    return end, trained
