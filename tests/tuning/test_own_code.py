"""A study of a user's own network, optimizer and smoothing on Ray: what its workers import is what the driver has."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbstudy.analysis.minima import compute as minima
from lbstudy.analysis.minima.sharpness import SharpnessSpec
from lbstudy.methods import user_code
from lbstudy.methods.checks import load_study
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.code import Code
from lbstudy.study.run import RunSpec
from lbstudy.training import datasets
from lbstudy.training.data import place
from lbstudy.training.train import train
from lbstudy.tuning import tuner
from lbstudy.tuning.confirm import as_study, plan_runs
from tests.own_code import MINE, STUDY
from tests.tuning.test_chaos import free_port


@pytest.fixture(autouse=True)
def afterwards_none() -> Iterator[None]:
    yield
    user_code.activate(Code())


def write(folder: Path, study: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    (folder / "study.yaml").write_text(study)
    return folder / "study.yaml"


@pytest.mark.long
def test_tuned_confirmed_and_measured_by_the_users_code(ray_session: None, tmp_path: Path):
    """From the copy alone: the file is gone when the work begins, and no worker has it on its path."""
    file = write(tmp_path / "here", STUDY.replace("epochs: 2", "epochs: 1"))
    study = load_study(file)
    folder = StudyFolder.create(tmp_path / "own", study, user_code.active())
    (tmp_path / "here" / "mine.py").unlink()
    study = load_study(folder.path / "study.yaml")
    data = datasets.load_all(study)
    told: list[str] = []
    tuner.tune_study(folder, tuner.plan(study, data, tuner.cluster_nodes()), lambda record: None, told.append)
    assert [trial.status for trial in folder.trials()] == 4 * ["completed"], [t.error for t in folder.trials()]

    runs = plan_runs(folder, study, 1, 1, False, "split", told.append)
    where = StudyFolder.create(folder.confirmation.path, study)
    planned = tuner.plan(as_study(study, runs), data, tuner.cluster_nodes())
    tuner.confirm_runs(where, planned, runs, lambda record: None, told.append)
    best = minima.best_runs(folder)
    lines, measures = minima.LandscapeSettings(directions=1, samples=20), SharpnessSpec(samples=20)
    tasks = minima.landscape_tasks(folder, "line", best, lines) + minima.sharpness_tasks(best[:1], measures)
    minima.compute(folder, study, data, tasks, lambda task: None, lambda task, why: told.append(why))
    assert [news for news in told if "are starting" not in news] == []  # which a busy machine says
    assert len(tasks) == 3
    assert all((folder.path / task.result).is_file() for task in tasks)

    smoothed = next(trial for trial in folder.trials() if trial.smoothing == "mine:SoftLabels")
    run = RunSpec.model_validate(smoothed.run)
    alone = train(run, place(datasets.load(run.dataset), run.dataset, run.split_seed))
    assert alone.fingerprint == smoothed.fingerprint


def lbstudy(*arguments: str, here: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-m", "lbstudy", *arguments],
        cwd=here, env=inherited | environment, capture_output=True, text=True, timeout=560,
    )  # fmt: skip
    assert not check or ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    return ran


def values(folder: StudyFolder) -> list[tuple[Any, ...]]:
    names = ("train_loss", "val_loss", "val_accuracy")
    return [(r.cell, r.number, *r.params.values(), *(r.metrics[name] for name in names)) for r in folder.trials()]


@pytest.mark.slow
def test_one_worker_and_two_killed_and_resumed_are_equal(tmp_path: Path):
    """In float64, over processes and to the report; then all commands on the study's folder, without the file."""
    study = STUDY.replace(
        "tuning: {trials: 2}", "tuning: {trials: 2, sampler: random}\nresources: {checkpoint_minutes: 0}"
    )
    study = study.replace("epochs: 2", "epochs: 12").replace("samples: 320", "samples: 2048")
    write(tmp_path, study)
    (tmp_path / "elsewhere").mkdir()
    lbstudy("run", "study.yaml", "--storage", "one", here=tmp_path)
    lbstudy("run", "study.yaml", "--storage", "two", "--workers", "2", here=tmp_path)
    one, two = (StudyFolder(tmp_path / name / "own") for name in ("one", "two"))
    for mine, other in zip(values(one), values(two), strict=True):
        assert mine[:2] == other[:2]
        assert mine[2:] == pytest.approx(other[2:], rel=1e-9, abs=1e-9)

    killed = StudyFolder(tmp_path / "killed" / "own")
    command = [sys.executable, "-m", "lbstudy", "run", "study.yaml", "--storage", "killed"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not any(0 < len(killed.epochs(r)) < 12 for r in (killed.trials() if killed.path.is_dir() else [])):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    (tmp_path / "mine.py").unlink()
    where = tmp_path / "elsewhere"
    lbstudy("run", str(killed.path), here=where)
    assert values(killed) == values(one)
    assert [r.fingerprint for r in killed.trials()] == [r.fingerprint for r in one.trials()]

    lbstudy("confirm", str(killed.path), "--seeds", "1", here=where)
    lbstudy("landscape", str(killed.path), "--directions", "1", "--samples", "50", here=where)
    lbstudy("sharpness", str(killed.path), "--samples", "50", here=where)
    without = tmp_path / "without"
    for name in ("torch", "ray"):
        (without / name).mkdir(parents=True)
        (without / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    for path in (killed.path / "code").iterdir():
        path.write_text("raise AssertionError('imported')")
    lbstudy("report", str(killed.path), here=where, PYTHONPATH=str(without))
    assert (killed.path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_second_node_that_lacks_the_file(tmp_path: Path):
    """Each trial has a worker on each of two nodes. The code is imported there from a folder of the second node's own,
    and never from where the driver has it."""
    from ray.cluster_utils import Cluster

    write(tmp_path / "here", STUDY.replace("tuning: {trials: 2}", "tuning: {trials: 1}\nresources: {workers: 2}"))
    for name in ("elsewhere", "head", "second"):
        (tmp_path / name).mkdir()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port(), "env_vars": {"TMPDIR": str(tmp_path / "head")},
        },
    )  # fmt: skip
    try:
        cluster.add_node(num_cpus=1, env_vars={"TMPDIR": str(tmp_path / "second")})
        file, storage = str(tmp_path / "here" / "study.yaml"), str(tmp_path)
        lbstudy("run", file, "--storage", storage, "--address", cluster.address, here=tmp_path / "elsewhere")
    finally:
        cluster.shutdown()
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)
    folder = StudyFolder(tmp_path / "own")
    trials: list[TrialRecord] = folder.trials()
    assert [(trial.status, trial.workers) for trial in trials] == 2 * [("completed", [2])]
    copies = {node: list((tmp_path / node).glob("lbstudy-*/code-*/mine.py")) for node in ("head", "second")}
    assert {node: len(found) for node, found in copies.items()} == {"head": 1, "second": 1}
    assert json.loads((folder.path / "code.json").read_text()).keys() == {"mine.py"}


@pytest.mark.slow
def test_with_nothing_but_an_installed_wheel(tmp_path: Path):
    """In an empty folder, through the installed command; the wheel's environment sees torch and Ray of this one."""
    root = Path(__file__).parents[2]
    subprocess.run(["uv", "build", "--wheel", "--out-dir", str(tmp_path / "dist"), str(root)], check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    install = ["uv", "pip", "install", "--no-deps", "--python", str(tmp_path / "venv" / "bin" / "python"), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    theirs = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "others.pth").write_text(theirs)  # after the wheel's own: a .pth file in that folder is not read
    here = tmp_path / "empty"
    write(here)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}

    def installed(*arguments: str) -> str:
        command = [str(tmp_path / "venv" / "bin" / "lbstudy"), *arguments]
        ran = subprocess.run(command, cwd=here, env=inherited, capture_output=True, text=True, timeout=560)
        assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
        return ran.stdout

    assert "code: mine.py (sha256 " in installed("plan", "study.yaml")
    installed("run", "study.yaml")
    installed("confirm", "studies/own", "--seeds", "1")
    installed("landscape", "studies/own", "--directions", "1", "--samples", "50")
    installed("sharpness", "studies/own", "--samples", "50")
    installed("report", "studies/own")
    assert (here / "studies" / "own" / "report.html").is_file()
