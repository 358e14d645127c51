"""Whatever the operating system refuses, a command says in a line: never a traceback, and exit code 1, 2 or 3."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lbstudy.console import cli
from lbstudy.records.folder import StudyFolder
from tests.analysis.report.test_page import whole_study

READ = [
    ["best"], ["status"], ["table", "gap"], ["table", "targets"], ["table", "health"], ["table", "critical"],
    ["figures"], ["report"], ["unlock"], ["landscape"], ["sharpness"], ["noise"], ["confirm"], ["run"], ["plan"],
]  # fmt: skip
"""Commands, each on a study's folder as its first argument."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: StudyFolder = whole_study(tmp_path_factory.mktemp("whole") / "s")
    return Path(str(folder.path))


def vanished(study: Path) -> Path:
    return study / "nowhere"


def a_file(study: Path) -> Path:
    (study.parent / "file").write_text("no study")
    return study.parent / "file"


def study_file_is_a_folder(study: Path) -> Path:
    (study / "study.yaml").unlink()
    (study / "study.yaml").mkdir()
    return study


def trial_is_a_folder(study: Path) -> Path:
    record = next(study.glob("trials/*/*/trial.json"))
    record.unlink()
    record.mkdir()
    return study


def records_are_garbage(study: Path) -> Path:
    for record in study.glob("trials/*/*/trial.json"):
        record.write_bytes(b"\xff\x00 garbage")
    return study


def study_file_is_no_text(study: Path) -> Path:
    (study / "study.yaml").write_bytes(b"name: \xff\xfe\n")
    return study


def oddly_named(study: Path) -> Path:
    return study.rename(study.with_name("a [red]b :100: 'q' \udcff"))


CASES = [vanished, a_file, study_file_is_a_folder, trial_is_a_folder, records_are_garbage, study_file_is_no_text, oddly_named]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", READ, ids=" ".join)
def test_a_folder_that_is_not_what_it_should_be(
    case: Callable[[Path], Path], command: list[str], study: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    from lbstudy.tuning import tuner

    def no_ray(*arguments: object, **options: object) -> None:
        raise OSError(5, "no Ray in this test", "/dev/ray")

    monkeypatch.setattr(tuner, "connect", no_ray)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place = case(Path(shutil.copytree(study, tmp_path / "s")))
    verb, *others = command
    monkeypatch.setattr(sys, "argv", ["lbstudy", verb, str(place), *others])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert exit_.value.code in (None, 0, 1, 2), printed.err
    if exit_.value.code == 2:
        assert printed.err.startswith(("error: ", "Usage", "notice: ", "the study cannot")) or "error: " in printed.err


ENVIRONMENTS = {
    "a notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "no home": {"HOME": ""},
    "an ASCII terminal": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "an empty address": {"RAY_ADDRESS": ""},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_that_does_not_suit(name: str, study: Path):
    environment = os.environ | ENVIRONMENTS[name]
    done = subprocess.run(
        [sys.executable, "-m", "lbstudy", "best", str(study)], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_an_error_that_nobody_foresaw_leaves_its_traceback_in_a_file(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lbstudy.console.results.print_best", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lbstudy", "best", str(study)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    (log,) = tmp_path.glob("lbstudy-error-*.log")
    line = capsys.readouterr().err
    assert exit_.value.code == 3
    assert line == (f"error: unexpected, please report it: ZeroDivisionError: division by zero (traceback in {log})\n")
    assert "Traceback" in log.read_text()
    assert "in broken" in log.read_text()
