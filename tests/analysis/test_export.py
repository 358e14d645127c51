"""`lbstudy export`: read back, the tables are those of `load`, and every column has a meaning."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

from lbstudy.analysis import export, load
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from tests.analysis.report.test_page import study_of, whole_study

RESULTS = Path(__file__).parents[2] / "docs/results"
SHIPPED = sorted(path.parent for path in RESULTS.glob("*/study.yaml"))


@pytest.fixture(params=SHIPPED, ids=lambda path: path.name)
def exported(request, tmp_path):
    folder = StudyFolder.open(str(request.param))
    return folder, tmp_path, export.export(folder, tmp_path)


def test_what_is_read_back_is_what_load_gives(exported):
    folder, to, files = exported
    trials, epochs = load.trials(folder), load.epochs(folder)
    sources = {
        "trials": trials,
        "confirmed": load.confirmed(folder),
        "epochs": epochs.drop(columns="within", errors="ignore"),
    }
    if "within" in epochs:
        sources["evaluations"] = load.evaluations(epochs)
    for name, source in sources.items():
        assert_frame_equal(pd.read_parquet(to / f"{name}.parquet"), source.reset_index(drop=True), check_dtype=False)
        csv = pd.read_csv(to / f"{name}.csv", dtype={"workers": str}, keep_default_na=False, na_values=[""])
        assert list(csv) == list(source)
        for column in source.select_dtypes("number"):  # to the last digit
            np.testing.assert_array_equal(csv[column].astype(float), source[column].astype(float))
    assert {path.stem for path in files} >= set(sources)


def test_every_column_has_a_meaning(exported):
    _, to, files = exported
    text = (to / export.DICTIONARY).read_text()
    for path in files:
        if path.suffix == ".csv":
            section = text.split(f"## {path.stem}\n")[1].split("\n## ")[0]
            described = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines()[5:] if line]
            assert described == list(pd.read_csv(path, nrows=0))
    assert "as the run reported it" not in text


def test_factors_and_tuned_values_are_described(tmp_path):
    study = study_of(["sgd"], [32], ["none"]).model_copy(update={"source": "a paper"})
    frame = pd.DataFrame({"cell": ["a"], "params.learning_rate": [0.1], "mine": [1]})
    text = export.dictionary(study, {"trials": frame})
    assert "The study follows: a paper" in text
    assert "| params.learning_rate | float64 | tuned value" in text
    assert "| mine | int64 | as the run reported it |" in text


def test_columns_that_mix_types_are_text(tmp_path):
    frame = export._typed(pd.DataFrame({"budget": ["short", 3], "number": [1, 2], "gone": [None, 0.5]}))
    assert list(frame["budget"]) == ["short", "3"]
    assert list(frame["number"]) == [1, 2]
    assert frame["gone"].dtype == float


def test_a_study_without_epochs_has_a_table_of_trials_alone_and_goes_into_its_own_folder(tmp_path):
    folder = whole_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    for path in folder.path.rglob("epochs.jsonl"):
        path.unlink()
    done = CliRunner().invoke(app, ["export", str(folder.path)], catch_exceptions=False)
    names = {path.name for path in (folder.path / "export").iterdir()}
    assert {"trials.csv", "trials.parquet", "columns.md"} <= names
    assert not any(name.startswith("epochs") for name in names)
    assert str(folder.path / "export" / "columns.md") in done.stdout
    assert "missing: Damaged, and left out" in done.stderr


def test_exported_again_it_replaces(tmp_path):
    folder = whole_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    first = {path.name: path.read_bytes() for path in export.export(folder, tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in export.export(folder, tmp_path / "a")}
    assert first == again


def test_a_file_where_the_folder_is_to_be_is_one_error(tmp_path):
    folder = whole_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]))
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="file: cannot be written: "):
        export.export(folder, tmp_path / "file")
