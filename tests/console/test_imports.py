"""What commands that look at studies must not import: each of these packages takes from a tenth of a second to seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from lbstudy.records.folder import StudyFolder
from tests.confirmed_runs import confirmed_study, study_of

TO_RUN = {"torch", "torchvision", "ray", "optuna", "sklearn", "timm"}
TO_DRAW = {"matplotlib", "PIL", "opda", "jinja2"}
TO_COMPUTE = {"scipy.stats", "scipy.optimize", "scipy.linalg", "scipy.sparse"}
TABLES = {"numpy", "pandas", "scipy", "pyarrow"}

MUST_NOT = {
    "--help": TO_RUN | TO_DRAW | TO_COMPUTE | TABLES,
    "run --help": TO_RUN | TO_DRAW | TO_COMPUTE | TABLES,
    "best STUDY": TO_RUN | TO_DRAW | TO_COMPUTE,
    "status STUDY": TO_RUN | TO_DRAW | TO_COMPUTE,
    "report STUDY": TO_RUN,
}
"""By command, with STUDY for a study's folder."""

PROGRAM = """
import sys
from lbstudy.console import cli
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    study = study_of(["sgd"], [32, 128], ["none"])
    accuracies = {"sgd-b32-none": [0.9, 0.8], "sgd-b128-none": [0.7, 0.75]}
    return confirmed_study(tmp_path_factory.mktemp("imports") / "s", study, accuracies)


def imported(program: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.partition("imported: ")[2].split())


@pytest.mark.parametrize("command", MUST_NOT)
def test_a_command_imports_no_more_than_it_needs(command: str, folder: StudyFolder):
    path: Path = folder.path  # type: ignore[assignment]
    found = imported(PROGRAM, *(str(path) if part == "STUDY" else part for part in command.split()))
    assert "lbstudy.console.cli" in found
    assert not MUST_NOT[command] & found


def test_the_report_itself_waits_for_no_part_of_scipy():
    program = "import sys, lbstudy.analysis.report.page; print('imported:', *sys.modules, file=sys.stderr)"
    assert not (TO_RUN | TO_COMPUTE | {"opda"}) & imported(program)
