"""What a study tries next: one Optuna study per cell, behind the interface of Ray Tune.

`StudySearch` hands out trials, cells taking turns, and tells Optuna how each ended: pruned trials as PRUNED with
their intermediate values, failed ones as FAIL, diverged ones as COMPLETE with the worst value. What a trial's value is
says `study/objective.py`. It is rebuilt
from the records when a study goes on and keeps no truth of its own. `TrialQueue`, beneath it, hands out a list of
trials and searches nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from lbstudy.parallel.randomness import derive_seed
from lbstudy.records.trial import FINISHED
from lbstudy.study import split
from lbstudy.study.objective import worst
from lbstudy.study.space import Range
from lbstudy.study.spec import Cell, StudySpec

optuna.logging.set_verbosity(optuna.logging.ERROR)

STATES = {
    "completed": optuna.trial.TrialState.COMPLETE,
    "diverged": optuna.trial.TrialState.COMPLETE,
    "pruned": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
}
"""What Optuna calls the end of a trial, by its status."""

VALUED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)

OBJECTIVE, ELAPSED = "objective", "elapsed"
"""What Tune is told of an epoch: what it came to, and how long the trial has trained (`objective.time_so_far`)."""


@dataclass(frozen=True)
class Past:
    """A trial that the records hold: how it stands, its objective after each epoch that counts, the time so far."""

    cell: Cell
    number: int
    params: dict[str, float]
    status: str
    values: tuple[float, ...]
    elapsed: float | None = None
    published: bool = False
    promoted: bool = False


def distribution(entry: Range) -> optuna.distributions.BaseDistribution:
    """A search range in Optuna's terms."""
    if entry.choice is not None:
        return optuna.distributions.CategoricalDistribution(entry.choice)
    low, high = entry.searched_bounds
    if entry.integer is not None:
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=entry.is_log)


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
    return CellTPE(seed=seed, n_startup_trials=tuning.startup_trials)


class CellTPE(optuna.samplers.TPESampler):
    """TPE of trials that all have the same parameters in the same ranges, as those of a cell have: it takes them from
    one, where Optuna's looks for what is common to all, which costs a third of a suggestion."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, optuna.distributions.BaseDistribution]:
        """The parameters that are sampled together; none before a trial has a value."""
        known = study.get_trials(deepcopy=False, states=VALUED)
        return {n: d for n, d in sorted(known[0].distributions.items()) if not d.single()} if known else {}


class CellSearch(OptunaSearch):
    """Optuna's study of one cell; its trials go by their numbers.

    Args:
        study: the study.
        cell: the cell.
        storage: of the Optuna study, which must be new.
        past: the cell's trials so far.
    """

    def __init__(self, study: StudySpec, cell: Cell, storage: optuna.storages.BaseStorage, past: Sequence[Past]):
        self._spec, self._cell, self._ranges = study, cell, study.ranges(cell)
        self._names = {n: f"1 - {n}" if r.one_minus_log_uniform else n for n, r in self._ranges.items()}
        self._ot_study: Any
        self._distributions = {self._names[name]: distribution(entry) for name, entry in self._ranges.items()}
        super().__init__(
            space=self._distributions,
            metric=OBJECTIVE,
            mode=study.tuning.direction[:3],
            study_name=cell.name,
            storage=storage,
            sampler=make_sampler(study, cell, 0),
        )
        self._untried = list(study.published_params(cell))
        self._sampled = 0
        for trial in sorted(past, key=lambda trial: trial.number):
            if trial.status in FINISHED and study.tuning.sampler != "qmc":  # which counts what it was asked for
                self._enter(trial)
                continue
            self.ask(trial.number, trial.params, published=trial.published)
            if study.tuning.sampler == "qmc" and not trial.published:
                _ = self._ot_trials[str(trial.number)].relative_params  # the point of the sequence that was its own
            for epoch, value in enumerate(trial.values, start=1):
                self.report(trial.number, epoch, value)
            if trial.status in FINISHED:
                self.tell(trial.number, trial.status, trial.values[-1] if trial.values else None)

    @property
    def is_first_of_its_own(self) -> bool:
        """Whether the next trial will be the first whose values were not published."""
        return not self._untried and not self._sampled

    def ask(
        self,
        number: int,
        params: dict[str, float] | None = None,
        hint: dict[str, float] | None = None,
        published: bool = False,
    ) -> tuple[dict[str, float], bool]:
        """Begin a trial. What was published comes first, in its order, whenever it came into the study.

        Args:
            number: of the trial in its cell.
            params: its tuned values, where they are known already.
            hint: values to try first, if they are not known yet and none were published.
            published: whether values that are known already were.

        Returns:
            The tuned values, and whether they were published.
        """
        if params:
            known: dict[str, float] | None = params
            self._count(params, published)
        else:
            published = bool(self._untried)
            known = self._untried.pop(0) if published else hint
            self._sampled += not published
        if known is not None:  # may leave tuned values open: those are sampled
            self._ot_study.enqueue_trial(self._searched(known))
        self._ot_study.sampler = make_sampler(self._spec, self._cell, number)
        suggested = self.suggest(str(number))
        assert suggested is not None
        values = {name: entry.searched(suggested[self._names[name]]) for name, entry in self._ranges.items()}
        return values | (known or {}), published

    def _enter(self, trial: Past) -> None:
        """Enter a trial that has ended, as one entry of the journal."""
        self._count(trial.params, trial.published)
        now, state = datetime.now(UTC), STATES[trial.status] if trial.values else optuna.trial.TrialState.FAIL
        params = self._searched(trial.params)
        self._ot_study._storage.create_new_trial(  # `add_trial` would refuse what 1 - (1 - x) rounds out of its range
            self._ot_study._study_id,
            optuna.trial.FrozenTrial(
                number=-1, trial_id=-1, state=state, value=trial.values[-1] if state in VALUED else None,
                params=params, distributions={name: self._distributions[name] for name in params},
                intermediate_values=dict(enumerate(trial.values, start=1)), datetime_start=now, datetime_complete=now,
                user_attrs={}, system_attrs={},
            ),
        )  # fmt: skip

    def _count(self, params: dict[str, float], published: bool) -> None:
        """Count a trial whose tuned values are known already."""
        if published and (tried := [entry for entry in self._untried if entry.items() <= params.items()]):
            self._untried.remove(tried[0])
        self._sampled += not published

    def _searched(self, params: dict[str, float]) -> dict[str, float]:
        """Tuned values by the names, and in the terms, that Optuna has for them."""
        return {self._names[name]: self._ranges[name].searched(v) for name, v in params.items() if name in self._ranges}

    def best_params(self) -> dict[str, float]:
        """The tuned values of the best trial that completed without diverging; empty where there is none."""
        states = (optuna.trial.TrialState.COMPLETE,)
        if not self._ot_study.get_trials(deepcopy=False, states=states):
            return {}
        if self._ot_study.best_value == worst(self._spec.tuning):
            return {}
        found = self._ot_study.best_trial.params
        return {name: self._ranges[name].searched(found[alias]) for name, alias in self._names.items()}

    def report(self, number: int, epoch: int, value: float) -> None:
        """A running trial's value after an epoch; Optuna's step is our epoch. A repeated epoch changes nothing."""
        trial = self._ot_trials[str(number)]
        if epoch not in trial.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, epoch)

    def tell(self, number: int, status: str, value: float | None) -> None:
        """How a trial ended."""
        trial, state = self._ot_trials.pop(str(number)), STATES[status]
        if state == optuna.trial.TrialState.COMPLETE:
            self._ot_study.tell(trial, value)
        else:
            self._ot_study.tell(trial, state=state)


QueuedTrial = tuple[Cell, int, dict[str, float], bool]
"""Cell, number, tuned values, and whether these were published."""


class TrialQueue(Searcher):
    """Hands out the trials of a list, in its order; those that failed and get another try come again at its end.

    Args:
        study: the study.
        waiting: the trials: cell, number, tuned values and whether these were published.
        begin: makes a trial's configuration of Tune's id for it and of the trial.
        try_again: is told that a trial has failed (by Tune's id) and says whether it gets another try.
    """

    def __init__(
        self,
        study: StudySpec,
        waiting: Sequence[QueuedTrial],
        begin: Callable[[str, Cell, int, dict[str, float], bool], dict[str, Any]],
        try_again: Callable[[str], bool],
    ):
        super().__init__(metric=OBJECTIVE, mode=study.tuning.direction[:3])
        self._begin, self._try_again = begin, try_again
        self._waiting = list(waiting)
        self._running: dict[str, QueuedTrial] = {}  # by Tune's id
        self.lanes: float = inf  # how many trials may run at the same time, now
        self._rests_until = 0.0

    def is_done(self) -> bool:
        """Whether there is nothing left to begin or to go on with."""
        return not self._waiting and not self._running

    def suggest(self, trial_id: str) -> Any:
        """The next trial, if there is a lane for it."""
        if (self._running and len(self._running) >= self.lanes) or time.monotonic() < self._rests_until:
            return None
        trial = self._waiting.pop(0) if self._waiting else self._new_trial()
        if trial is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = trial
        return self._begin(trial_id, *trial)

    def rest(self, seconds: float) -> None:
        """Hand out nothing for so long."""
        self._rests_until = time.monotonic() + seconds

    def _new_trial(self) -> QueuedTrial | None:
        """A trial beyond those that wait, if there is one."""
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial; one that failed may get another try."""
        trial = self._running.pop(trial_id)
        failed = error or not result or result.get("outcome") == "failed"
        if failed and self._try_again(trial_id):
            self._waiting.append(trial)
        else:
            self._ended(trial, None if failed else result)

    def _ended(self, trial: QueuedTrial, result: dict[str, Any] | None) -> None:
        """A trial has ended for good, with its last result, or without one because it failed."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the search into a snapshot that nobody reads

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are the truth, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class StudySearch(TrialQueue):
    """All cells of a study: gives each its trials, one after the other, interrupted ones first.

    Args:
        study: the study.
        storage: of all cells' Optuna studies, which must be new.
        past: what the records hold.
        begin: see `TrialQueue`.
        try_again: see `TrialQueue`.
        notice: is told in a sentence what a user should know.
    """

    def __init__(
        self,
        study: StudySpec,
        storage: optuna.storages.BaseStorage,
        past: Sequence[Past],
        begin: Callable[[str, Cell, int, dict[str, float], bool], dict[str, Any]],
        try_again: Callable[[str], bool],
        notice: Callable[[str], None] = lambda sentence: None,
    ):
        super().__init__(study, [], begin, try_again)
        self._study, self._notice = study, notice
        cells = study.list_cells()
        self._searches = {
            cell: CellSearch(study, cell, storage, [trial for trial in past if trial.cell == cell]) for cell in cells
        }
        self._open = {cell: list(range(study.tuning.trials)) for cell in cells}  # numbers that have not begun
        for trial in past:
            self._open[trial.cell].remove(trial.number)
            if trial.status not in FINISHED:
                self._waiting.append((trial.cell, trial.number, trial.params, trial.published))

    def is_done(self) -> bool:
        """Whether there is nothing left to begin or to go on with."""
        return super().is_done() and not any(self._open.values())

    def _new_trial(self) -> QueuedTrial | None:
        """A new trial of the cell that has begun the fewest; cells that a rule takes their rate from come first."""
        rule = self._study.tuning.learning_rate_rule
        first = [cell for cell in self._open if rule and cell.batch_size == rule.reference and self._open[cell]]
        cell = max(first or self._open, key=lambda cell: len(self._open[cell]))
        if not self._open[cell]:
            return None
        number = self._open[cell].pop(0)
        search = self._searches[cell]
        hint = self._scaled_rate(cell) if search.is_first_of_its_own else None
        return (cell, number, *search.ask(number, hint=hint))

    def _scaled_rate(self, cell: Cell) -> dict[str, float] | None:
        """The learning rate that the study's rule gives a cell, as far as its reference is known."""
        rule, entry = self._study.tuning.learning_rate_rule, self._study.ranges(cell).get("learning_rate")
        reference = cell.but(batch_size=rule.reference) if rule else cell
        if reference not in self._searches:  # with as many updates it is the same run as with the study's own budget
            reference = reference.but(factors=split.whole(reference.factors))
        if rule is None or entry is None or reference not in self._searches or cell.batch_size <= rule.reference:
            return None
        best = self._searches[reference].best_params().get("learning_rate")
        if best is None:
            self._notice(f"{cell.name}: {reference.name} has no completed trial to scale a learning rate from")
            return None
        low, high = entry.bounds
        scaled = best * rule.factor(cell.batch_size)
        rate = min(max(scaled, low), high)
        cut = "" if rate == scaled else f", cut to its range {entry}"
        self._notice(f"{cell.name} tries learning rate {scaled:.3g} first: {rule.rule} rule from {best:.3g}{cut}")
        return {"learning_rate": rate}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch's value; nothing yet where the trial has but begun."""
        if "epoch" not in result:
            return
        cell, number, *_ = self._running[trial_id]
        self._searches[cell].report(number, result["epoch"], result[OBJECTIVE])

    def _ended(self, trial: QueuedTrial, result: dict[str, Any] | None) -> None:
        cell, number, *_ = trial
        if result is None:
            self._searches[cell].tell(number, "failed", None)
            return
        self._searches[cell].report(number, result["epoch"], result[OBJECTIVE])
        self._searches[cell].tell(number, result.get("outcome", "pruned"), result[OBJECTIVE])
