"""Which trials a study ends early: one ASHA per cell, behind the interface of Ray Tune.

In a study that is tuned for a target, a trial ends when it has reached it. It then has its value for good, and counts
with it at all rungs to come; one that still runs when its time is that of its cell's best cannot become the best any
more, and is ended with or without ASHA.

A trial that was promoted (`promotion.py`) is not ended any more.

`StudyPruner` is rebuilt from the records when a study goes on; it keeps no truth of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lbstudy.records.trial import FINISHED
from lbstudy.study.objective import MISSED
from lbstudy.study.spec import Asha, StudySpec
from lbstudy.tuning.search import ELAPSED, OBJECTIVE, Past

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class CellAsha(AsyncHyperBandScheduler):
    """ASHA of one cell, with one bracket."""

    def enter(self, trial_id: str, values: Sequence[float]) -> None:
        """Put the values of a trial that has ended into the rungs, as `on_trial_result` does, without its verdicts:
        each is a percentile of all trials at the rung, and nobody asks for them any more."""
        (bracket,) = self._brackets
        self._trial_info[trial_id] = bracket
        for epoch, value in enumerate(values, start=1):
            if epoch < self._max_t:
                for milestone, recorded in bracket._rungs:
                    if epoch >= milestone and trial_id not in recorded:
                        recorded[trial_id] = value if self._mode == "max" else -value
                        break


class StudyPruner(FIFOScheduler):
    """An ASHA per cell, its rungs counted in the epochs of its budget; trials run in the order they were suggested.

    Args:
        study: the study.
        epochs: of a whole run, by cell name.
        past: what the records hold; finished trials fill the rungs.
    """

    def __init__(self, study: StudySpec, epochs: dict[str, int], past: Sequence[Past]):
        super().__init__()
        pruner = study.tuning.pruner
        self._goal = study.tuning.goal
        self._rungs = {
            cell.name: study.rungs(cell, epochs[cell.name]) for cell in study.list_cells() if cell.name in epochs
        }
        self._best: dict[str, float] = {}  # log10 of the least time to the target, by cell
        self._cells: dict[str, CellAsha] = {}
        if isinstance(pruner, Asha):
            for cell in (cell for cell in study.list_cells() if cell.name in epochs):
                longest, pace = epochs[cell.name], study.variant(cell).budget.pace(cell.batch_size)
                self._cells[cell.name] = CellAsha(
                    time_attr="epoch",
                    metric=OBJECTIVE,
                    mode=study.tuning.direction[:3],
                    max_t=longest,
                    grace_period=min(pruner.grace_period * pace, longest),  # type: ignore[arg-type]  # may be a float
                    reduction_factor=pruner.reduction_factor,
                )
        for trial in past:
            if trial.status in FINISHED:
                self.replay(trial)

    def replay(self, trial: Past) -> bool:
        """Enter a trial's values into its cell's rungs; returns whether its last one prunes it."""
        action, controller, cell = TrialScheduler.CONTINUE, cast("TuneController", None), trial.cell.name
        if cell in self._cells and trial.status in FINISHED:
            self._cells[cell].enter(_identity(cell, trial.number).trial_id, trial.values)
        elif cell in self._cells and trial.values:
            known = _identity(cell, trial.number)
            self._cells[cell].on_trial_add(controller, known)  # ASHA does not look at the controller
            for epoch, value in enumerate(trial.values, start=1):
                action = self._cells[cell].on_trial_result(controller, known, {"epoch": epoch, OBJECTIVE: value})
        if trial.values:
            self._hit(cell, trial.number, len(trial.values), trial.values[-1])
        beaten = trial.status not in FINISHED and self._is_beaten(cell, trial.elapsed)
        return not trial.promoted and (beaten or action == TrialScheduler.STOP)

    def _hit(self, cell: str, number: int, epoch: int, value: float) -> None:
        """A trial that reached the target has its value at all rungs to come."""
        if self._goal is None or value > MISSED:
            return
        self._best[cell] = min(value, self._best.get(cell, value))
        if cell in self._cells:
            for rung in self._rungs[cell]:
                if rung > epoch:
                    self._cells[cell].on_trial_result(
                        cast("TuneController", None), _identity(cell, number), {"epoch": rung, OBJECTIVE: value}
                    )

    def _is_beaten(self, cell: str, elapsed: float | None) -> bool:
        """Whether a trial that has not reached the target after this time comes too late to be its cell's best."""
        return elapsed is not None and elapsed >= self._best.get(cell, inf)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The cells' schedulers already know both."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins in its cell, or goes on."""
        cell, number = trial.config["cell"], trial.config["number"]
        if cell in self._cells:
            self._cells[cell].on_trial_add(tune_controller, _identity(cell, number))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if "epoch" not in result:  # the news that the trial has begun
            return TrialScheduler.CONTINUE
        cell, number = trial.config["cell"], trial.config["number"]
        if trial.config.get("promoted"):
            return TrialScheduler.CONTINUE
        if self._is_beaten(cell, result.get(ELAPSED)):
            return TrialScheduler.STOP
        if cell not in self._cells:
            return TrialScheduler.CONTINUE
        return self._cells[cell].on_trial_result(tune_controller, _identity(cell, number), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last value of a trial that ended by itself still counts for the rung it reached."""
        cell, number = trial.config["cell"], trial.config["number"]
        if OBJECTIVE in result:
            self._hit(cell, number, result["epoch"], result[OBJECTIVE])
        if cell in self._cells and OBJECTIVE in result:
            self._cells[cell].on_trial_complete(tune_controller, _identity(cell, number), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial is gone before it ended; its rungs keep what they have."""


def _identity(cell: str, number: int) -> Any:
    """What ASHA knows a trial by: the same after an interruption, unlike Tune's own id."""
    return SimpleNamespace(trial_id=f"{cell} {number}")
