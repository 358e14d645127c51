"""What a study's runs cost, measured on a real Ray."""

import json
import sys
from pathlib import Path

import pytest

from lbstudy.console import cli, costs
from lbstudy.study.file import StudyError
from lbstudy.study.objective import objective
from lbstudy.training import datasets
from lbstudy.tuning import measure, tuner
from tests.conftest import TINY_STUDY, tiny_study


@pytest.mark.long
def test_plan_measures_and_leaves_nothing(ray_session: None, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(tuner, "connect", lambda verbose=False: None)
    monkeypatch.setattr(tuner, "disconnect", lambda in_order: None)
    seen: list[measure.Measured] = []
    real = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    path, scratch = tmp_path / "tiny.yaml", tmp_path / "scratch"
    path.write_text(json.dumps(TINY_STUDY))  # JSON is YAML
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lbstudy", "plan", "tiny.yaml", "--measure", "--price", "3", "--seeds", "2"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_.value.code, captured.err
    (measured,) = seen
    assert list(measured.costs) == [cell.name for cell in tiny_study().list_cells()]
    assert not measured.failed
    for cost in measured.costs.values():
        assert 0 < cost.epoch <= cost.first
        assert cost.epoch < cost.confirmed  # which evaluates four times as many images
        assert cost.images_per_second > 0
    assert 50e6 < measured.memory < 1e10
    assert 0 < measured.starting < measured.seconds
    assert "tuning: 4 cells x 4 trials" in captured.out
    assert "confirm --seeds 2: 8 runs" in captured.out
    assert "at 3 an hour" in captured.out
    assert "disk: at most" in captured.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "tiny.yaml"]
    assert not list(scratch.glob("lbstudy-*"))


def test_a_run_that_fails_is_told_and_no_costs_are_made_up():
    study = tiny_study()
    planned = tuner.plan(study, datasets.load_all(study), [{"CPU": 2.0}])
    measured = measure.Measured({}, {"sgd-b128-none": "Traceback\nout of memory with batch_size 128\n"}, 0, 0, 0, "", 0)
    with pytest.raises(StudyError, match=r"^sgd-b128-none has failed: out of memory with batch_size 128$"):
        costs.print_measured(planned, measured, None, 5)


def test_measured_runs_begin_gently():
    study = tiny_study()
    values = {cell.name: measure.gentle_values(study, cell) for cell in study.list_cells()}
    assert values["sgd-b32-none"] == {"learning_rate": 1e-3}  # its middle would diverge
    assert values["sgd-b128-mixup+noise"] == pytest.approx(
        {"learning_rate": 1e-3, "mixup_alpha": 0.55, "noise_magnitude": 1e-2}
    )


def test_a_target_that_is_not_known_yet_is_not_measured_by():
    auto = tiny_study(tuning={"trials": 2, "metric": "steps_to_target", "target": "auto"})
    report = {"val_accuracy": 0.5, "val_loss": 1.0}
    assert objective(measure.measurable(auto).tuning, report, None) == 0.5
    given = tiny_study(tuning={"trials": 2, "metric": "steps_to_target", "target": {"val_accuracy": 0.9}})
    assert measure.measurable(given).tuning == given.tuning
