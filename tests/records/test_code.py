"""The code that a study ran with is part of its record."""

import json
from pathlib import Path

import pytest

from lbstudy.records.folder import StudyFolder
from lbstudy.study.code import Code, read_code
from lbstudy.study.file import StudyError, StudyFile
from lbstudy.study.spec import StudySpec
from tests.conftest import tiny_study

CODE = Code({"mine.py": b"x = 1\n", "nets/__init__.py": b"", "nets/data.bin": bytes(range(256))})


def study() -> StudySpec:
    return tiny_study(code=["../elsewhere/mine.py", "nets"])


def test_the_copy_reads_back(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study(), CODE)
    assert folder.study().code == ["mine.py", "nets"]
    found = read_code(StudyFile(folder.path / "study.yaml"))
    assert found.files == CODE.files
    assert json.loads((folder.path / "code.json").read_text()) == CODE.checksums


def test_a_study_without_code_has_no_copy(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    assert sorted(path.name for path in folder.path.iterdir()) == ["environment.json", "study.yaml"]


def test_the_same_code_goes_on_and_other_code_does_not(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study(), CODE)
    before = (folder.path / "code" / "mine.py").stat().st_mtime_ns
    StudyFolder.create(tmp_path / "s", folder.study(), CODE)
    StudyFolder.create(tmp_path / "s", study(), CODE)
    assert (folder.path / "code" / "mine.py").stat().st_mtime_ns == before
    other = Code({"mine.py": b"x = 2\n", "nets/__init__.py": b"", "nets/more.py": b""})
    with pytest.raises(StudyError) as caught:
        StudyFolder.check(tmp_path / "s", study(), other)
    headline, *diff = str(caught.value).splitlines()
    assert "holds a study that ran with other code" in headline
    assert diff == [
        f"- mine.py sha256 {CODE.checksums['mine.py']}",
        f"+ mine.py sha256 {other.checksums['mine.py']}",
        f"- nets/data.bin sha256 {CODE.checksums['nets/data.bin']}",
        f"+ nets/more.py sha256 {other.checksums['nets/more.py']}",
    ]
    assert read_code(StudyFile(folder.path / "study.yaml")).files == CODE.files


def test_code_cannot_be_dropped_or_added(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", study(), CODE)
    with pytest.raises(StudyError, match="holds another study"):
        folder.require_extension(tiny_study())
    plain = StudyFolder.create(tmp_path / "plain", tiny_study())
    with pytest.raises(StudyError, match="holds another study"):
        plain.require_extension(study(), CODE)


def test_a_driver_that_dies_while_copying_leaves_a_study_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lbstudy import storage

    writes = storage.write
    for crash_at in range(1, 6):
        path, count = tmp_path / str(crash_at), 0

        def crashing(target: Path, content: bytes, crash_at: int = crash_at) -> None:
            nonlocal count
            count += 1
            if count == crash_at:
                raise KeyboardInterrupt
            writes(target, content)

        monkeypatch.setattr(storage, "write", crashing)
        with pytest.raises(KeyboardInterrupt):
            StudyFolder.create(path, study(), CODE)
        monkeypatch.setattr(storage, "write", writes)
        StudyFolder.create(path, study(), CODE)
        assert read_code(StudyFile(path / "study.yaml")).files == CODE.files
