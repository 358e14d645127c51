"""The page docs/bring-your-own.md: what stands there works as it stands there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbstudy.methods import configure, user_code
from lbstudy.methods.checks import load_study
from lbstudy.study.code import Code
from lbstudy.study.spec import StudySpec
from lbstudy.training import datasets, fitting, own_data
from lbstudy.training.data import place
from lbstudy.training.train import train

PAGE = Path(__file__).parents[1] / "docs" / "bring-your-own.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[StudySpec]:
    """The page's study, with its four pieces of code in one file."""
    (tmp_path / "mine.py").write_text("\n\n".join(blocks("python")))
    (tmp_path / "study.yaml").write_text(blocks("yaml")[0])
    yield load_study(tmp_path / "study.yaml")
    user_code.activate(Code())


def test_the_page_has_one_study_and_four_pieces():
    assert len(blocks("yaml")) == 1
    names = [re.findall(r"^(?:class|def) (\w+)", block, flags=re.MULTILINE) for block in blocks("python")]
    assert names == [["network"], ["data"], ["SignMomentum"], ["SoftLabels"]]


@pytest.mark.parametrize("place_in_list", [0, 1])
def test_its_runs_train(study: StudySpec, place_in_list: int):
    data = datasets.load_all(study, read=own_data.load)
    fitting.check(study, data)
    fitting.try_on(study, data)
    cell = study.list_cells()[place_in_list]
    run = configure.run_spec(study, cell, {"learning_rate": 5e-3, "beta": 0.9}, seed=0)
    (dataset,) = data.values()
    outcome = train(run, place(dataset, run.dataset, run.split_seed))
    assert not outcome.diverged
    assert outcome.last.val_accuracy > 0.3  # of ten classes, after two epochs


def test_pieces_need_no_other(tmp_path: Path):
    """Each stands for itself: it can be copied alone."""
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), {"__name__": "alone"})
    assert "alone" not in sys.modules
