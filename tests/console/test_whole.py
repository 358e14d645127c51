"""One command from the study file to the report: what it asks for, and one such run on the session's Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from lbstudy.analysis.minima import compute as minima
from lbstudy.analysis.minima.compute import LandscapeSettings
from lbstudy.analysis.minima.sharpness import SharpnessSpec
from lbstudy.console import cli, session, whole
from lbstudy.console.session import resolve
from lbstudy.console.whole import Evidence, whole_study
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.tuning import tuner
from tests.confirmed_runs import confirmed_study, study_of
from tests.conftest import TINY_STUDY
from tests.console.every_command import lbstudy

SMALL = {
    **TINY_STUDY,
    "dataset": {"name": "digits", "validation_size": 0.2},
    "budget": {"epochs": 1},
    "cells": {"optimizer": ["sgd"], "batch_size": [32, 128], "smoothing": ["none"]},
    "search": {"learning_rate": {"log_uniform": [1e-2, 5e-2]}},
    "published": [],
    "tuning": {"trials": 1, "pruner": "none"},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command line has asked for."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "whole_study", lambda study, source, *arguments: found.append((study, *arguments)))
    return found


@pytest.fixture
def study_file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_its_options_are_those_of_the_commands_that_it_stands_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, study_file: str, asked: list[tuple[Any, ...]]
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = ["--trials", "3", "--set", "seed=4", "--name", "mine", "--storage", str(tmp_path / "s")]
    assert lbstudy(["all", study_file, *given, "--seeds", "2", "--published", "--address", "auto"]) == 0
    study, path, wanted, address, command, verbose = asked[0]
    assert (study.name, study.tuning.trials, study.seed) == ("mine", 3, 4)
    assert path == tmp_path / "s" / "mine"
    assert (wanted.seeds, wanted.published, address, verbose) == (2, True, "auto", False)
    assert command == f"lbstudy all {path} --seeds 2 --published --address auto"


def test_its_settings_are_the_defaults_of_those_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[tuple[Any, ...]]
):
    """Else they would refuse to go on with what it has computed."""
    folder = confirmed_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]), {"sgd-b32-none": [0.9, 0.8]})
    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        cli, "_compute", lambda folder, study, tasks, where, settings, *_: kept.update({where: settings})
    )
    for arguments in (["all"], ["landscape"], ["sharpness"]):
        assert lbstudy([arguments[0], str(folder.path)]) == 0
    wanted: Evidence = asked[0][2]
    assert kept == {"landscape/line": wanted.landscapes, "sharpness": wanted.sharpness}
    assert all(wanted.looks_at(run) for run in folder.confirmation.trials())


@pytest.mark.parametrize("command", ["landscape", "sharpness", "noise"])
def test_minima_are_looked_at_on_another_machine(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, study_file: str
):
    """A study that was tuned on GPUs, where there are none; what `--set` would make another study is refused."""
    study, asked = resolve(study_file, None, None, None, None, None, ["resources.gpus_per_worker=0.5"])[0], []
    folder = str(confirmed_study(tmp_path / "s", study, {"sgd-b32-none": [0.9]}).path)
    monkeypatch.setattr(cli, "load_data", lambda *_: {})
    monkeypatch.setattr(cli, "on_ray", lambda work, *_: asked.append(work.args[0].resources.gpus_per_worker))
    assert lbstudy([command, folder, "--set", "resources.gpus_per_worker=0"]) == 0
    assert lbstudy([command, folder, "--set", "seed=5"]) == 2
    assert "holds another study" in capsys.readouterr().err
    assert asked == [0]


BAD = {
    "storage beside a folder": (["FOLDER", "--storage", "elsewhere"], "--storage elsewhere: "),
    "another study": (["FOLDER", "--set", "seed=5"], "holds another study"),
    "no tracker": (["FOLDER", "--track", "mlflow"], "tracker mlflow: "),
    "no data": (["FILE", "--set", "dataset.name=cifar10", "--data", "/nowhere"], "cifar10 is not in /nowhere"),
    "no seeds": (["FILE", "--seeds", "0"], "'--seeds'"),
    "results of an older rule": (["FOLDER"], "sharpness holds results made by rule 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_any_work(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, study_file: str
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = StudyFolder.create(tmp_path / "s", resolve(study_file, None, None, None, None, None, None)[0])
    (tmp_path / "s" / "sharpness" / "sgd-b32-none").mkdir(parents=True)
    rule = 1 if case.startswith("results") else 2
    (tmp_path / "s" / "sharpness" / "settings.json").write_text(json.dumps({"samples": 10, "rule": rule}))
    (tmp_path / "s" / "sharpness" / "sgd-b32-none" / "0000.json").write_text("{}")
    arguments, message = BAD[case]
    places = {"FOLDER": str(folder.path), "FILE": study_file}
    assert lbstudy(["all", *(places.get(argument, argument) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "starting Ray" not in said
    assert folder.trials() == []


@pytest.fixture
def on_the_sessions_ray(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tuner, "connect", lambda verbose: None)
    monkeypatch.setattr(tuner, "disconnect", lambda in_order: None)


@pytest.mark.long
def test_from_the_file_to_the_report_and_again_what_is_missing(
    on_the_sessions_ray: None, tmp_path: Path, study_file: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    def all_of_it(samples: int = 20) -> tuple[int, str]:
        study, source = resolve(study_file, None, None, None, None, None, None)
        sharpness = SharpnessSpec(
            samples=samples, eigenvalues=1, trace_probes=8, density_probes=1, density_steps=2, epsilons=(1e-3,),
            subspace=2, subspace_draws=2, m=10, average_draws=2,
        )  # fmt: skip
        wanted = Evidence(LandscapeSettings(directions=1, samples=samples), sharpness, seeds=1)
        with pytest.raises(cli.typer.Exit) as end:
            whole_study(study, source, tmp_path / "s", wanted, None, "the same command", False, hint="and now?")
        return end.value.exit_code, capsys.readouterr().out

    code, out = all_of_it()
    assert code == 0
    assert out.splitlines()[-2:] == [f"report: {tmp_path / 's' / 'report.html'}", "and now?"]
    folder = StudyFolder.open(tmp_path / "s")
    assert [trial.status for trial in folder.trials()] == ["completed"] * 2
    assert [run.status for run in folder.confirmation.trials()] == ["completed"] * 2
    results = {
        str(path.relative_to(folder.path)) for path in folder.path.glob("*/**/0*.*") if "trials" not in path.parts
    }
    assert results == {
        *(f"sharpness/sgd-b{size}-none/0000.json" for size in (32, 128)),
        *(f"landscape/line/sgd-b{size}-none/0000/000.csv" for size in (32, 128)),
        "landscape/interpolate/sgd-b128-none/0000/000.csv",
    }

    # again: a result is missing, and is computed with the settings of the others; all else stays, and no lane starts
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.suffix in (".csv", ".pt")}
    lost = folder.path / "sharpness" / "sgd-b32-none" / "0000.json"
    lost.unlink()
    monkeypatch.setattr(tuner, "fit_runs", None)
    told: list[str] = []
    compute = session.compute_tasks
    monkeypatch.setattr(whole, "compute_tasks", lambda *a: (told.extend(t.result for t in a[2]), compute(*a)))
    assert all_of_it(samples=10)[0] == 0
    assert told == ["sharpness/sgd-b32-none/0000.json"]
    assert json.loads(lost.read_text())["samples"] == 20
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_study_without_a_completed_trial_has_a_report_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study = study_of(["sgd"], [32], ["none"], tuning={"trials": 1, "pruner": "none"})
    monkeypatch.setattr(whole, "run_study", lambda study, source, path, address, command, work, verbose: work({}))
    monkeypatch.setattr(whole, "tune", lambda study, path, *_: StudyFolder.create(path, study) and study)
    wanted = Evidence(LandscapeSettings(), SharpnessSpec())
    with pytest.raises(cli.typer.Exit) as end:
        whole_study(study, None, tmp_path / "s", wanted, None, "lbstudy all s", False)  # type: ignore[arg-type]
    assert end.value.exit_code == 1
    said = capsys.readouterr().err
    assert "no trial has completed yet, so there is nothing to confirm" in said
    assert "1 trials are missing; to go on: lbstudy all s" in said
    assert (tmp_path / "s" / "report.html").is_file()


def test_settings_of_results_that_are_there_are_kept(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    asked, theirs = SharpnessSpec(samples=10), SharpnessSpec(samples=20)
    minima.keep_settings(folder, "sharpness", theirs)
    assert minima.kept_settings(folder, "sharpness", asked) == asked  # they came to no result
    (tmp_path / "s" / "sharpness" / "sgd-b32-none").mkdir()
    (tmp_path / "s" / "sharpness" / "sgd-b32-none" / "0000.json").write_text("{}")
    assert minima.kept_settings(folder, "sharpness", asked) == theirs
    minima.keep_settings(folder, "sharpness", theirs)
    with pytest.raises(StudyError, match="holds results with samples 20"):
        minima.keep_settings(folder, "sharpness", asked)
