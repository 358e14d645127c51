"""What is tried first, and in what scale, without Ray."""

from pathlib import Path

import numpy as np
import optuna
import pytest
import scipy.stats
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lbstudy.methods.checks import load_study
from lbstudy.study.file import StudyError
from lbstudy.study.load import find_study
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.tuning.journal import DriverJournal
from lbstudy.tuning.search import CellSearch, Past, StudySearch


class TestLearningRateRule:
    """The best learning rate of the smallest batch, scaled, is what larger ones try first."""

    RULE = {"tuning.learning_rate_rule": {"from": 128, "rule": "sqrt"}, "tuning.trials": 2}
    RANGE = {"search": {"learning_rate": {"log_uniform": [1e-3, 0.3]}}}

    def begun(self, value: float, **changes: object) -> tuple[dict[tuple[str, int], float], list[str]]:
        """Learning rates by cell and number, one trial after the other, and what was said."""
        cells = {"optimizer": ["sgd"], "batch_size": [512, 128], "smoothing": ["none"]}
        study = load_study(
            find_study("digits"), {"cells": cells, "published": [], **self.RANGE, **self.RULE, **changes}
        )
        rates: dict[tuple[str, int], float] = {}
        said: list[str] = []

        def begin(
            trial_id: str, cell: Cell, number: int, params: dict[str, float], published: bool
        ) -> dict[str, object]:
            rates[cell.name, number] = params["learning_rate"]
            return {}

        search = StudySearch(study, optuna.storages.InMemoryStorage(), [], begin, lambda trial_id: False, said.append)
        for n in range(4):
            search.suggest(str(n))
            best = {"epoch": 1, "objective": value / (1 + n), "outcome": "completed"}
            search.on_trial_complete(str(n), best)
        return rates, said

    def test_reference_first_then_its_best_rate_scaled(self):
        rates, said = self.begun(0.5)
        assert [cell for cell, _ in rates] == ["sgd-b128-none", "sgd-b128-none", "sgd-b512-none", "sgd-b512-none"]
        assert rates["sgd-b512-none", 0] == min(2 * rates["sgd-b128-none", 0], 0.3)
        assert said[0].startswith("sgd-b512-none tries learning rate")
        assert "sqrt rule" in said[0]

    def test_nothing_is_scaled_from_diverged_trials(self):
        rates, said = self.begun(0.0)
        assert said == ["sgd-b512-none: sgd-b128-none has no completed trial to scale a learning rate from"]
        assert len(rates) == 4

    @pytest.mark.parametrize(("rule", "reason"), [
        ({"from": 64, "rule": "sqrt"}, "no cell has batch size 64; the cells have 128, 512"),
        ({"from": 512, "rule": "sqrt"}, "no cell with a batch size above 512 tunes its learning rate"),
        ({"from": 128, "rule": "cube"}, "'linear' or 'sqrt'"),
    ])  # fmt: skip
    def test_rules_that_cannot_apply(self, rule: dict[str, object], reason: str):
        with pytest.raises(StudyError, match=reason):
            self.begun(0.5, **{"tuning.learning_rate_rule": rule})


def test_one_minus_log_uniform_is_searched_in_the_logarithm_of_the_rest():
    entry = {"one_minus_log_uniform": [1e-3, 0.5]}
    study = load_study(find_study("digits"), {
        "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]}, "tuning.sampler": "random",
        "search": {"learning_rate": {"uniform": [0.1, 1]}, "momentum": entry}, "tuning.trials": 200,
        "published": [{"optimizer": "sgd", "batch_size": 128, "smoothing": "none", "params": {"momentum": 0.9}}],
    })  # fmt: skip
    (cell,) = study.list_cells()
    search = CellSearch(study, cell, optuna.storages.InMemoryStorage(), [])
    momenta = [search.ask(number)[0]["momentum"] for number in range(200)]
    assert momenta[0] == 0.9
    rest = np.log(1 - np.array(momenta[1:]))
    assert scipy.stats.kstest(rest, scipy.stats.uniform(np.log(1e-3), np.log(500)).cdf).pvalue > 0.01
    momentum = study.ranges(cell)["momentum"]
    assert momentum.bounds == (0.5, 0.999)
    assert momentum.position(1 - (1e-3 * 0.5) ** 0.5) == pytest.approx(0.5)
    assert [momentum.edge(value) for value in (0.501, 0.9, 0.9989)] == ["low", None, "high"]
    assert momentum.contains(0.99)
    assert not momentum.contains(0.9999)


def a_cell(sampler: str = "tpe") -> tuple[StudySpec, Cell]:
    study = load_study(find_study("digits"), {
        "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]}, "tuning.sampler": sampler,
        "search": {"learning_rate": {"log_uniform": [1e-3, 1]}, "momentum": {"uniform": [0, 0.99]},
                   "weight_decay": {"uniform": [0, 0.1]}},
        "tuning.trials": 60, "tuning.startup_trials": 5,
        "published": [{"optimizer": "sgd", "batch_size": 128, "smoothing": "none", "params": {"learning_rate": 0.3}}],
    })  # fmt: skip
    return study, study.list_cells()[0]


def run_some(search: CellSearch, cell: Cell, numbers: range) -> list[Past]:
    """Trials that end in all ways: values are a function of the parameters."""
    past = []
    for number in numbers:
        params, published = search.ask(number)
        status = ("completed", "pruned", "completed", "diverged", "failed", "completed")[number % 6]
        values = [] if status == "failed" else [sum(params.values()) / (1 + epoch) for epoch in range(1 + number % 3)]
        for epoch, value in enumerate(values, start=1):
            search.report(number, epoch, value)
        search.tell(number, status, values[-1] if values else None)
        past.append(Past(cell, number, params, status, tuple(values), None, published))
    return past


def test_the_sampler_suggests_what_optunas_own_does(monkeypatch: pytest.MonkeyPatch):
    study, cell = a_cell()
    own = run_some(CellSearch(study, cell, optuna.storages.InMemoryStorage(), []), cell, range(40))
    monkeypatch.setattr("lbstudy.tuning.search.CellTPE", optuna.samplers.TPESampler)
    assert run_some(CellSearch(study, cell, optuna.storages.InMemoryStorage(), []), cell, range(40)) == own


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_a_journal_rebuilt_holds_what_the_first_one_held(tmp_path: Path, sampler: str):
    """The same trials but for their times, read by Optuna's own backend; with TPE an entry for each that has ended."""
    study, cell = a_cell(sampler)
    past: list[Past] = []
    found = []
    for name in ("first", "again"):
        path = tmp_path / name
        with path.open("wb") as out:
            search = CellSearch(study, cell, JournalStorage(DriverJournal(out)), past)
            if not past:
                past = run_some(search, cell, range(20))
                past.append(Past(cell, 20, search.ask(20)[0], "running", ()))
            following = search.ask(21)[0]
        (read,) = JournalStorage(JournalFileBackend(str(path))).get_all_studies()
        trials = JournalStorage(JournalFileBackend(str(path))).get_all_trials(read._study_id)
        found.append([(t.number, t.state, t.params, t.distributions, t.values, t.intermediate_values) for t in trials])
        found[-1].append(following)
    assert found[0] == found[1]
    assert sampler == "qmc" or len((tmp_path / "again").read_text().splitlines()) < 20 + 20
