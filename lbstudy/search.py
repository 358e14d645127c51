"""What a study tries next: one Optuna study and one ASHA per cell, behind the interfaces of Ray Tune.

`StudySearch` hands out trials, cells taking turns, and tells Optuna how each ended: pruned trials as PRUNED with
their intermediate values, failed ones as FAIL, diverged ones as COMPLETE with the worst finite value.
`StudyPruner` keeps a separate ASHA for each cell, so that cells are not compared while they are being tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from lbstudy.randomness import derive_seed
from lbstudy.space import Range
from lbstudy.study import Asha, Cell, StudySpec

optuna.logging.set_verbosity(optuna.logging.ERROR)

OBJECTIVE = "objective"
WORST_LOSS = 100.0


def objective(metric: str, report: dict[str, Any], outcome: str | None) -> float:
    """The value that is searched for: the report's metric, or the worst finite value where the run has diverged."""
    if outcome == "diverged":
        return 0.0 if metric == "val_accuracy" else WORST_LOSS
    return min(report[metric], WORST_LOSS)


def distribution(entry: Range) -> optuna.distributions.BaseDistribution:
    """A search range in Optuna's terms."""
    if entry.choice is not None:
        return optuna.distributions.CategoricalDistribution(entry.choice)
    low, high = entry.bounds
    if entry.integer is not None:
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=entry.log_uniform is not None)


def make_sampler(study: StudySpec, cell: Cell, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of a cell's trial. Its seed belongs to the trial, so that a suggestion follows from the trials
    before it and not from how often the study was interrupted. QMC's seed belongs to the cell: one sequence."""
    tuning = study.tuning
    seed = derive_seed(study.seed, "sampler", cell.name, *([] if tuning.sampler == "qmc" else [number]))
    if tuning.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if tuning.sampler == "qmc":
        return optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_asynchronous_seeding=False)
    if tuning.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=tuning.startup_trials)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=tuning.startup_trials)


class CellSearch(OptunaSearch):
    """Optuna's study of one cell."""

    def __init__(self, study: StudySpec, cell: Cell, storage: optuna.storages.BaseStorage):
        self._spec, self._cell = study, cell
        self._ot_study: Any
        super().__init__(
            space={name: distribution(entry) for name, entry in study.ranges(cell).items()},
            metric=OBJECTIVE,
            mode=study.tuning.direction[:3],
            study_name=cell.name,
            storage=storage,
            sampler=make_sampler(study, cell, 0),
        )
        for params in study.published_params(cell):  # may leave tuned values open, which OptunaSearch would refuse
            self._ot_study.enqueue_trial(params, user_attrs={"published": True})

    def ask(self, trial_id: str, number: int) -> tuple[dict[str, float], bool]:
        """The tuned values of the cell's next trial, and whether they were published."""
        self._ot_study.sampler = make_sampler(self._spec, self._cell, number)
        params = self.suggest(trial_id)
        assert params is not None
        return params, bool(self._ot_trials[trial_id].user_attrs.get("published", False))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch's value; Optuna's step is our epoch."""
        self._ot_trials[trial_id].report(result[OBJECTIVE], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """How the trial ended."""
        trial, states = self._ot_trials.pop(trial_id), optuna.trial.TrialState
        outcome = "failed" if error or not result else result.get("outcome", "pruned")
        if outcome == "failed":
            self._ot_study.tell(trial, state=states.FAIL)
            return
        assert result is not None
        trial.report(result[OBJECTIVE], result["epoch"])
        if outcome == "pruned":
            self._ot_study.tell(trial, state=states.PRUNED)
        else:
            self._ot_study.tell(trial, result[OBJECTIVE])


class StudySearch(Searcher):
    """All cells of a study: gives each its trials, one after the other.

    Args:
        study: the study.
        storage: of all cells' Optuna studies.
        begin: makes a trial's configuration of its id, cell, number, tuned values and whether they were published.
    """

    def __init__(
        self,
        study: StudySpec,
        storage: optuna.storages.BaseStorage,
        begin: Callable[[str, Cell, int, dict[str, float], bool], dict[str, Any]],
    ):
        super().__init__(metric=OBJECTIVE, mode=study.tuning.direction[:3])
        self._study, self._begin = study, begin
        self._searches = {cell: CellSearch(study, cell, storage) for cell in study.list_cells()}
        self._suggested = dict.fromkeys(self._searches, 0)
        self._cell_of: dict[str, Cell] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial, of the cell that has begun the fewest."""
        cell = min(self._suggested, key=self._suggested.__getitem__)
        number = self._suggested[cell]
        if number >= self._study.tuning.trials:
            return Searcher.FINISHED
        self._suggested[cell] += 1
        self._cell_of[trial_id] = cell
        params, published = self._searches[cell].ask(trial_id, number)
        return self._begin(trial_id, cell, number, params, published)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an epoch's value on to the cell."""
        self._searches[self._cell_of[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial on to the cell."""
        self._searches[self._cell_of[trial_id]].on_trial_complete(trial_id, result, error)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the search into a snapshot that nobody reads

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are the truth, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class StudyPruner(FIFOScheduler):
    """An ASHA per cell, its rungs counted in epochs; trials run in the order they were suggested.

    Args:
        study: the study.
        epochs: of a whole run, by cell name.
    """

    def __init__(self, study: StudySpec, epochs: dict[str, int]):
        super().__init__()
        pruner = study.tuning.pruner
        self._cells: dict[str, AsyncHyperBandScheduler] = {}
        if isinstance(pruner, Asha):
            for name, longest in epochs.items():
                self._cells[name] = AsyncHyperBandScheduler(
                    time_attr="epoch",
                    metric=OBJECTIVE,
                    mode=study.tuning.direction[:3],
                    max_t=longest,
                    grace_period=min(pruner.grace_period, longest),
                    reduction_factor=pruner.reduction_factor,
                )

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The cells' schedulers already know both."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins in its cell."""
        if trial.config["cell"] in self._cells:
            self._cells[trial.config["cell"]].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if trial.config["cell"] not in self._cells:
            return TrialScheduler.CONTINUE
        return self._cells[trial.config["cell"]].on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial's last value still counts for the rungs it reached; a failed trial's does not."""
        if trial.config["cell"] in self._cells:
            finite = math.isfinite(result.get(OBJECTIVE, math.nan))
            self._cells[trial.config["cell"]].on_trial_complete(tune_controller, trial, result if finite else {})

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial is gone before it ended."""
        if trial.config["cell"] in self._cells:
            self._cells[trial.config["cell"]].on_trial_remove(tune_controller, trial)
