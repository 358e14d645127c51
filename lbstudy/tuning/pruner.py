"""Which trials a study ends early: one ASHA per cell, behind the interface of Ray Tune.

`StudyPruner` is rebuilt from the records when a study goes on; it keeps no truth of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lbstudy.records.folder import FINISHED
from lbstudy.study.spec import Asha, StudySpec
from lbstudy.tuning.search import OBJECTIVE, Past

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


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
        self._cells: dict[str, AsyncHyperBandScheduler] = {}
        if isinstance(pruner, Asha):
            for cell in (cell for cell in study.list_cells() if cell.name in epochs):
                longest, pace = epochs[cell.name], study.variant(cell).budget.pace(cell.batch_size)
                self._cells[cell.name] = AsyncHyperBandScheduler(
                    time_attr="epoch",
                    metric=OBJECTIVE,
                    mode=study.tuning.direction[:3],
                    max_t=longest,
                    grace_period=min(pruner.grace_period * pace, longest),  # type: ignore[arg-type]  # may be a float
                    reduction_factor=pruner.reduction_factor,
                )
        for trial in past:
            if trial.status in FINISHED:
                self.replay(trial.cell.name, trial.number, trial.values)

    def replay(self, cell: str, number: int, values: Sequence[float]) -> bool:
        """Enter a trial's values into its cell's rungs; returns whether its last one prunes it."""
        action, controller = TrialScheduler.CONTINUE, cast("TuneController", None)  # ASHA does not look at it
        if cell in self._cells and values:
            trial = _identity(cell, number)
            self._cells[cell].on_trial_add(controller, trial)
            for epoch, value in enumerate(values, start=1):
                action = self._cells[cell].on_trial_result(controller, trial, {"epoch": epoch, OBJECTIVE: value})
        return action == TrialScheduler.STOP

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
        cell, number = trial.config["cell"], trial.config["number"]
        if cell not in self._cells:
            return TrialScheduler.CONTINUE
        return self._cells[cell].on_trial_result(tune_controller, _identity(cell, number), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last value of a trial that ended by itself still counts for the rung it reached."""
        cell, number = trial.config["cell"], trial.config["number"]
        if cell in self._cells and OBJECTIVE in result:
            self._cells[cell].on_trial_complete(tune_controller, _identity(cell, number), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial is gone before it ended; its rungs keep what they have."""


def _identity(cell: str, number: int) -> Any:
    """What ASHA knows a trial by: the same after an interruption, unlike Tune's own id."""
    return SimpleNamespace(trial_id=f"{cell} {number}")
