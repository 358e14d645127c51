"""Whatever the operating system refuses, a command says in a line: never a traceback, and exit code 1, 2 or 3."""

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lbstudy.analysis.figures import all as figures
from lbstudy.console import cli, watch
from lbstudy.records.folder import StudyFolder
from lbstudy.tuning import tuner
from tests.analysis.report.test_page import whole_study
from tests.console.every_command import COMMANDS, SHORT_WATCH, lbstudy, without_ray


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
    return study.rename(study.with_name("a [red]b :100: 'q' \n \udcff"))


def a_link_to_itself(study: Path) -> Path:
    (study.parent / "loop").symlink_to("loop")
    return study.parent / "loop"


def a_name_that_is_too_long(study: Path) -> Path:
    return study.parent / ("x" * 300)


def may_not_be_entered(study: Path) -> Path:
    study.chmod(0)
    return study


def study_file_may_not_be_read(study: Path) -> Path:
    (study / "study.yaml").chmod(0)
    return study


def trial_may_not_be_read(study: Path) -> Path:
    next(study.glob("trials/*/*/trial.json")).chmod(0)
    return study


def trials_may_not_be_listed(study: Path) -> Path:
    (study / "trials").chmod(0)
    return study


def read_only(study: Path) -> Path:
    for path in (study, *study.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return study


def full(study: Path) -> Path:
    """Nothing can be written any more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return study


CASES = [
    vanished, a_file, study_file_is_a_folder, trial_is_a_folder, records_are_garbage, study_file_is_no_text,
    oddly_named, a_link_to_itself, a_name_that_is_too_long, may_not_be_entered, study_file_may_not_be_read,
    trial_may_not_be_read, trials_may_not_be_listed, read_only, full,
]  # fmt: skip


class Capabilities(ctypes.Structure):
    """What `capset` takes: twice 32 bits of each."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def as_the_owner_only() -> Iterator[None]:
    """Root, too, may only do what the modes of files say; limits that are set meanwhile end with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    had, less = (Capabilities * 2)(), (Capabilities * 2)()
    for found in (had, less):
        assert not libc.capget(header, found)
    less[0].effective &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert not libc.capset(header, less)
    try:
        yield
    finally:
        assert not libc.capset(header, had)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[None]:
    """Files can be removed again in the end."""
    yield
    for folder, _, _ in os.walk(tmp_path):
        Path(folder).chmod(0o755)


QUICK = [*COMMANDS[:2], ["figures", "STUDY"], ["table", "STUDY", "gap"], *COMMANDS[14:17], *COMMANDS[19:23]]
"""Of each kind of command one or two; the others do the same with a place."""

SLOWLY = [pytest.param(command, marks=() if command in QUICK else pytest.mark.slow) for command in COMMANDS]


@pytest.mark.parametrize("command", SLOWLY, ids=" ".join)
@pytest.mark.parametrize("case", CASES)
def test_a_place_that_is_not_what_it_should_be(
    case: Callable[[Path], Path], command: list[str], study: Path, tmp_path: Path, restored: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    nothing = figures.Drawing("learning_curves", "Accuracy", None, "figures take seconds", "learning_curves")
    monkeypatch.setattr(figures, "draw_all", lambda *arguments, **at_most: [nothing])
    monkeypatch.setattr(tuner, "connect", without_ray)
    monkeypatch.setattr(watch, "time", SHORT_WATCH)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = Path(shutil.copytree(study, tmp_path / "s"))
    with as_the_owner_only():
        place = case(place)
        code = lbstudy([str(place) if part == "STUDY" else part for part in command])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert code in (0, 1, 2, 143), printed.err
    assert code != 2 or "error: " in printed.err or "✗" in printed.out


ENVIRONMENTS = {
    "a notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "no home": {"HOME": ""},
    "an ASCII terminal": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "an empty address": {"RAY_ADDRESS": ""},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
    "a proxy": dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_that_does_not_suit(name: str, study: Path):
    done = begun([sys.executable, "-m", "lbstudy", "best", str(study)], os.environ | ENVIRONMENTS[name])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def begun(command: list[str], environment: dict[str, str], output: str = "") -> subprocess.CompletedProcess[str]:
    """A command, when it has ended."""
    if output:
        command = ["sh", "-c", f'exec "$@" {output}', "sh", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("output", [">&-", ">/dev/full", ">/dev/full 2>&-"])
@pytest.mark.parametrize("command", [["--version"], ["best", "STUDY"]], ids=" ".join)
def test_output_that_goes_nowhere(command: list[str], output: str, study: Path):
    arguments = [str(study) if part == "STUDY" else part for part in command]
    done = begun([sys.executable, "-m", "lbstudy", *arguments], dict(os.environ), output)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "full" in output else 0)
    if output == ">/dev/full":
        assert done.stderr.startswith("error: ")
        assert "No space left on device" in done.stderr


def another_user() -> list[str]:
    """The wrapper for a user whom no file knows, who may read what is here; skips where that is not permitted."""
    sees = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    wrapper = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *sees, "env", "-u", "HOME"]
    try:
        tried = subprocess.run([*wrapper, sys.executable, "-c", "import lbstudy"], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(str(error))
    if tried.returncode:
        pytest.skip(f"not permitted here: {tried.stderr.decode().strip()[-200:]}")
    return wrapper


def every_command(study: Path, *wrapper: str, **environment: str) -> dict[str, int]:
    """Run all commands, somewhere else; returns their exit codes by what they are called."""
    command = [*wrapper, sys.executable, "-m", "tests.console.every_command", str(study)]
    done = begun(command, os.environ | environment)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    codes = re.findall(r"^exit code (\d+): (.*)$", done.stdout, flags=re.MULTILINE)
    assert len(codes) == len(COMMANDS)
    return {name: int(code) for code, name in codes}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_in_an_environment_that_does_not_suit(name: str, study: Path, tmp_path: Path):
    place = Path(shutil.copytree(study, tmp_path / "s"))
    codes = every_command(place, **ENVIRONMENTS[name])
    assert set(codes.values()) <= {0, 2, 143}
    assert codes["figures STUDY"] == codes["report STUDY"] == codes["plan STUDY"] == codes["table STUDY gap"] == 0


@pytest.mark.slow
def test_every_command_of_another_user_without_a_home(study: Path, tmp_path: Path):
    place = Path(shutil.copytree(study, tmp_path / "s"))
    codes = every_command(place, *another_user())
    assert set(codes.values()) <= {0, 2, 143}
    assert codes["best STUDY"] == codes["plan STUDY"] == codes["table STUDY gap"] == 0
    assert codes["figures STUDY"] == codes["report STUDY"] == codes["run STUDY"] == 2  # it is not theirs to write


SMALL = {
    "name": "tiny", "model": "lenet5", "dataset": {"name": "digits", "validation_size": 0.2}, "budget": {"epochs": 1},
    "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]},
    "search": {"learning_rate": {"log_uniform": [1e-3, 1e-1]}}, "tuning": {"trials": 1, "pruner": "none"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("who", ["behind a proxy", "another user without a home"])
def test_a_study_runs_for(who: str, tmp_path: Path):
    (tmp_path / "study.yaml").write_text(json.dumps(SMALL))
    with tempfile.TemporaryDirectory() as place:  # below no folder of the present user
        Path(place).chmod(0o777)
        wrapper = another_user() if who != "behind a proxy" else []
        environment = ENVIRONMENTS["a proxy"] if not wrapper else {"RAY_TMPDIR": place}
        command = ["run", str(tmp_path / "study.yaml"), "--storage", f"{place}/studies"]
        done = begun([*wrapper, sys.executable, "-m", "lbstudy", *command], os.environ | environment)
        assert done.returncode == 0, done.stderr
        assert [trial.status for trial in StudyFolder(Path(place) / "studies" / "tiny").trials()] == ["completed"]


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
