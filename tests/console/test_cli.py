"""The command line, without Ray: what it prints, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from lbstudy.console import cli, terminal
from lbstudy.console.progress import Progress
from lbstudy.console.session import in_lanes, load_data, notice, resolve
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock
from lbstudy.study.spec import StudySpec
from lbstudy.tuning import doctor
from tests.conftest import TINY_STUDY, tiny_study
from tests.records.test_folder import record, with_versions


def lbstudy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line here; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lbstudy", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def study_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY_STUDY))  # JSON is YAML
    return str(path)


BAD = {
    "no such file": (["run", "nowhere.yaml"], "no such study file"),
    "bad --set": (["run", "FILE", "--set", "trials"], "must be KEY=VALUE"),
    "unknown key in --set": (["run", "FILE", "--set", "tuning.trails=3"], "did you mean `trials`"),
    "zero epochs": (["run", "FILE", "--epochs", "0"], "budget.epochs: input should be greater than 0; got 0"),
    "data nowhere": (
        ["run", "FILE", "--set", "dataset.name=cifar10", "--data", "/nowhere"],
        "cifar10 is not in /nowhere",
    ),
    "batch too large": (
        ["run", "FILE", "--set", "cells.batch_size=[9999]", "--set", "published=[]"],
        "9999 is more than",
    ),
    "not a study": (["best", "/nowhere"], "no study here"),
    "validation takes all": (["run", "FILE", "--set", "dataset.validation_size=5000"], "dataset.validation_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_exit_code_2(case: str, monkeypatch, capsys, study_file: str, tmp_path: Path):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert lbstudy(monkeypatch, *(study_file if a == "FILE" else a for a in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert "starting Ray" not in captured.err
    assert not (tmp_path / "studies").exists()


def test_unknown_flag_is_exit_code_2():
    ran = subprocess.run(
        [sys.executable, "-m", "lbstudy", "run", "digits", "--epoch", "3"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "--epochs" in ran.stderr


def test_plan_shows_cells_and_runs_nothing(monkeypatch, capsys, study_file: str, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert lbstudy(monkeypatch, "plan", study_file, "--trials", "7") == 0
    text = capsys.readouterr().out
    assert "sgd-b32-mixup+noise" in text
    assert "4 cells x 7 trials x at most 4 epochs" in text
    assert "[0.001, 1e+06] log" in text
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]

    assert "cost: not measured; --measure" in text


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["dataset.name=cifar10", "dataset.root=/nowhere"], "cifar10 is not in /nowhere"),
        (["cells.batch_size=[9999]", "published=[]"], "9999 is more than"),
        (["model={name: vgg9, depth: 3}"], "depth"),
    ],
)
def test_plan_of_a_study_that_cannot_run_ends_with_the_error_of_run(
    sets: list[str], message: str, monkeypatch, capsys, study_file: str
):
    arguments = [study_file, *(part for text in sets for part in ("--set", text))]
    assert lbstudy(monkeypatch, "plan", *arguments) == 2
    planned = capsys.readouterr()
    assert message in planned.err
    assert lbstudy(monkeypatch, "run", *arguments) == 2
    assert capsys.readouterr().err == planned.err
    if "model" not in sets[0]:  # of which nothing is known without it
        assert "4 cells x 4 trials" in planned.out or "2 cells x 4 trials" in planned.out


def test_a_price_without_a_measure_is_refused(monkeypatch, capsys, study_file: str):
    assert lbstudy(monkeypatch, "plan", study_file, "--price", "2") == 2
    assert "--price needs --measure" in capsys.readouterr().err


def test_schema_is_json(monkeypatch, capsys):
    assert lbstudy(monkeypatch, "schema") == 0
    assert "cells" in json.loads(capsys.readouterr().out)["properties"]


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(record(status="completed", metrics={"epoch": 4, "val_accuracy": 0.9, "val_loss": 0.1}))
    return folder


@pytest.mark.parametrize("style", ["table", "csv", "json", "markdown", "latex"])
def test_best_prints_every_format(monkeypatch, capsys, folder: StudyFolder, style: str):
    assert lbstudy(monkeypatch, "best", str(folder.path), "--format", style) == 0
    assert "0.9" in capsys.readouterr().out


@pytest.mark.parametrize("style", ["table", "csv", "json", "markdown", "latex"])
@pytest.mark.parametrize("kind", ["gap", "targets", "health"])
def test_table_prints_every_kind_and_what_is_missing(monkeypatch, capsys, folder: StudyFolder, kind: str, style: str):
    assert lbstudy(monkeypatch, "table", str(folder.path), kind, "--format", style) == 0
    captured = capsys.readouterr()
    assert "none" in captured.out
    assert "missing: Nothing has been confirmed" in captured.err
    assert "missing: 1 of 16 trials have ended" in captured.err


BAD_TABLES = {
    "kind": (["size"], "is not one of 'published', 'gap', 'split', 'targets', 'critical', 'health'"),
    "accuracy": (["targets", "--accuracy", "93"], "must be a fraction above 0 and at most 1, but got 93"),
    "loss": (
        ["gap", "--loss", "0.1"],
        "--loss and --accuracy are for the tables `targets` and `critical`, but got `gap`",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_one_error_and_exit_code_2(case: str, monkeypatch, capsys, folder: StudyFolder):
    arguments, message = BAD_TABLES[case]
    assert lbstudy(monkeypatch, "table", str(folder.path), *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_who_goes_on_with_other_versions_is_told(capsys, study_file: str, tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    load_data(*resolve(study_file, None, None, None, None, None, None), folder.path)
    assert "versions" not in capsys.readouterr().err
    with_versions(folder, torch="1.13.1")
    load_data(*resolve(str(folder.path), None, None, None, None, None, None), folder.path)
    assert "s has run with other versions, which may change results: torch 1.13.1 then" in capsys.readouterr().err


MARKED = "a [red]b :100: runs:fire:x"


def test_text_is_not_taken_for_markup(capsys):
    terminal.print_table(pd.DataFrame({"note": [MARKED]}), title=MARKED)
    terminal.out.print(MARKED)
    notice(MARKED)
    printed = capsys.readouterr()
    assert printed.out.count(MARKED) == 3
    assert printed.err == f"notice: {MARKED}\n"


@pytest.mark.parametrize("ok", [True, False])
def test_doctor_writes_names_as_they_are(monkeypatch, capsys, ok: bool):
    found = [doctor.Finding("storage", ok, MARKED)]
    monkeypatch.setattr(doctor, "examine", lambda *arguments: iter(found))
    assert lbstudy(monkeypatch, "doctor") == (0 if ok else 2)
    assert capsys.readouterr().out == f"{'✓' if ok else '✗'} storage: {MARKED}\n"


def test_storage_beside_a_studys_folder_is_refused(monkeypatch, capsys, folder: StudyFolder):
    assert lbstudy(monkeypatch, "run", str(folder.path), "--storage", "elsewhere") == 2
    assert capsys.readouterr().err.startswith(f"error: --storage elsewhere: {folder.path} is a study's folder")


@pytest.mark.parametrize("given", [["--data", "t"], ["--data=~/t"], ["--set", "dataset.root=t"]])
def test_the_datas_folder_is_known_from_anywhere(monkeypatch, given: list[str], study_file: str, tmp_path: Path):
    """`study.yaml` says where the data are, whatever folder the study goes on in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    studies: list[StudySpec] = []
    monkeypatch.setattr(cli, "run_study", lambda study, *arguments: studies.append(study))
    lbstudy(monkeypatch, "run", study_file, "--set", "dataset.name=image_folder", *given)
    assert studies[0].dataset.root == str(tmp_path / "t")


def test_a_home_in_storage_is_expanded_whoever_does_it(monkeypatch, study_file: str, tmp_path: Path):
    """A shell leaves `--storage=~/studies` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    places: list[Path] = []
    monkeypatch.setattr(cli, "run_study", lambda study, source, path, *arguments: places.append(path))
    lbstudy(monkeypatch, "run", study_file, "--storage=~/studies")
    assert places == [tmp_path / "studies" / "tiny"]


WIDE = pd.DataFrame(
    {
        "cell": ["kfac-b1310720-mixup+noise", "sgd-b128-none"],
        "gap": ["0.0314 [0.0163, 0.0466]", "-"],
        "n": ["3", "12"],
        "test_accuracy": ["0.965 ± 0.00324", "0.3"],
        "note": ["much to say " * 30, "-"],
    }
)


@pytest.mark.parametrize("room", [10, 40, 60, 200])
def test_no_number_is_cut_however_narrow_the_terminal(room: int, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "out", Console(width=room))
    terminal.print_table(WIDE, title="t")
    lines = capsys.readouterr().out.splitlines()
    for text in WIDE.drop(columns="note").to_numpy().ravel():
        assert any(text in line for line in lines)
    assert "…" not in "".join(lines)
    assert " ".join(lines).count("much") == 30
    if room >= 40:
        assert all(len(line) <= max(room, 2 + 25 + 24) for line in lines)  # a name and a sentence


def test_columns_that_find_no_room_follow_below_with_the_names_of_their_rows():
    assert [list(block) for block in terminal.fit_columns(WIDE, 200)] == [list(WIDE)]
    first, second, third = terminal.fit_columns(WIDE, 58)
    assert [list(first), list(second), list(third)] == [
        ["cell", "gap", "n"],
        ["cell", "test_accuracy"],
        ["cell", "note"],
    ]
    assert third == {"cell": 25, "note": 31}


def test_status(monkeypatch, capsys, folder: StudyFolder):
    assert lbstudy(monkeypatch, "status", str(folder.path)) == 0
    assert "sgd-b32-none" in capsys.readouterr().out


def test_status_tells_trials_that_run_from_those_that_a_driver_left(monkeypatch, capsys, folder: StudyFolder):
    folder.write_trial(record(number=7, status="running", metrics={}))
    assert lbstudy(monkeypatch, "status", str(folder.path)) == 0
    left = capsys.readouterr().out
    with DriverLock(folder.path, print):
        assert lbstudy(monkeypatch, "status", str(folder.path)) == 0
    held = capsys.readouterr().out
    assert "interrupted" in left
    assert "running" not in left
    assert "running" in held
    assert "interrupted" not in held


def test_version(monkeypatch, capsys):
    assert lbstudy(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_elsewhere(terminal: bool):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Progress(tiny_study(), console) as progress:
        progress.update(record(number=0, metrics={"epoch": 1, "val_accuracy": 0.5}, seconds=1.0))
        progress.update(record(number=0, status="completed", metrics={"epoch": 4, "val_accuracy": 0.75}, seconds=4.0))
        progress.update(record(number=1, status="diverged", metrics={"epoch": 1, "val_accuracy": 0.1}, seconds=1.0))
        table = Console(file=io.StringIO(), width=120)
        table.print(progress._table())
    assert "2/16 trials" in table.file.getvalue()
    assert "0.7500" in table.file.getvalue()
    lines = console.file.getvalue()
    assert ("trial 0   completed epoch 4    val_accuracy 0.7500  1/16" in lines) != terminal


def test_what_was_done_before_is_one_line_and_not_in_the_estimate(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=lambda form: "12:00:00")
    monkeypatch.setattr("lbstudy.console.progress.time", clock)
    console = Console(file=io.StringIO(), width=120)

    def end(number: int, seconds: float, after: float, **changes: object) -> str:
        now[0] += after
        before = len(console.file.getvalue())
        end = {"epoch": 4, "val_accuracy": 0.75}
        progress.update(record(number=number, status="completed", metrics=end, seconds=seconds, **changes))
        return console.file.getvalue()[before:]

    done = [record(cell="sgd-b128-none", number=n, status="completed", metrics={"val_accuracy": 0.9}) for n in range(3)]
    done.append(record(number=0, status="diverged", metrics={"epoch": 1}, seconds=500.0))
    with Progress(tiny_study(), console) as progress:
        progress.take_up([*done, record(number=1, metrics={"epoch": 3}, seconds=300.0)])
        assert console.file.getvalue() == "4 of 16 trials are done already: 3 completed, 1 diverged\n"
        progress.update(record(number=1, metrics={"epoch": 3}, seconds=300.0))  # it has a lane, and goes on
        assert end(1, 400.0, after=150.0).endswith("5/16  ETA 0:18:20\n")  # 100 s of it just now, and 11 to come
        assert end(2, 50.0, after=50.0).endswith("6/16  ETA 0:12:30\n")  # 150 s for two, and 10 to come
        assert progress._cells["sgd-b128-none"].row()[1:] == ["3/4", "0", "0", "0", "0", "0.9000"]
    assert len(console.file.getvalue().splitlines()) == 3


def test_nothing_done_before_is_no_line():
    console = Console(file=io.StringIO(), width=120)
    with Progress(tiny_study(), console) as progress:
        progress.take_up([record(number=1, metrics={"epoch": 3}, seconds=300.0)])
    assert console.file.getvalue() == ""


def test_one_lane_is_one_lane():
    assert [in_lanes(count) for count in (0, 1, 2)] == ["0 lanes", "1 lane", "2 lanes"]


def test_somebody_elses_package_named_analysis_is_not_in_the_way(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "study", tiny_study())
    folder.write_trial(record(status="completed", metrics={"epoch": 4, "val_accuracy": 0.75, "val_loss": 0.5}))
    theirs = tmp_path / "analysis"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("raise ImportError('not ours')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "lbstudy", "best", str(folder.path)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.75" in done.stdout
