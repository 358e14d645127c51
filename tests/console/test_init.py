"""`lbstudy init`: what it writes stands as it is, and nothing is overwritten."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbstudy.console.begin import FILES, FIRST_STUDY, Place, begin
from lbstudy.console.cli import app
from lbstudy.study.file import StudyError

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize("place", [None, *Place], ids=str)
def test_a_study_its_schema_and_the_files_of_the_place(tmp_path, place):
    done = run("init", tmp_path / "new", *(["--cluster", place.value] if place else []))
    assert done.exit_code == 0
    names = [FIRST_STUDY, "study.schema.json", *(FILES[place] if place else [])]
    assert done.stdout.splitlines() == [str(tmp_path / "new" / name) for name in names]
    assert {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*") if p.is_file()} == set(
        names
    )
    assert f"lbstudy plan {tmp_path / 'new' / FIRST_STUDY}" in done.stderr


def test_the_study_plans_as_it_stands(tmp_path):
    run("init", tmp_path)
    done = run("plan", tmp_path / FIRST_STUDY)
    assert done.exit_code == 0
    assert "8 cells x 6 trials" in done.stdout


@pytest.mark.parametrize("there", [FIRST_STUDY, "study.schema.json", "clusters/slurm.sh"])
def test_nothing_is_overwritten_and_then_nothing_written(tmp_path, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("mine")
    with pytest.raises(StudyError, match=f"{there}: already there, and not overwritten"):
        begin(tmp_path, Place.slurm)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / there]
    assert (tmp_path / there).read_text() == "mine"


def test_every_cluster_file_of_the_source_tree_is_written_for_some_place():
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clusters").rglob("*") if path.is_file()}
    assert shipped | {"cluster.yaml"} == {name for names in FILES.values() for name in names}
    assert all((ROOT / f"docs/cluster/{place.value}.md").is_file() for place in Place)


def test_a_file_where_the_folder_is_to_be_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="file: cannot be written: "):
        begin(tmp_path / "file", None)
