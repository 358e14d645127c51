"""The code that a study names: what is taken, what is refused, and the copy in a study's folder."""

import hashlib
import json
import site
from pathlib import Path

import pytest

from lbstudy.study import code as code_module
from lbstudy.study.code import CHECKSUMS, FOLDER, Code, read_code
from lbstudy.study.file import KeyProblems, StudyFile


def study_file(folder: Path, entries: str) -> StudyFile:
    (folder / "study.yaml").write_text(f"name: x\ncode: {entries}\n")
    return StudyFile(folder / "study.yaml")


def test_files_and_folders_are_read_whole(tmp_path: Path):
    (tmp_path / "mine.py").write_bytes(b"x = 1\n")
    for path in ("src/nets/__init__.py", "src/nets/deep/block.py", "src/nets/weights.npy", "src/nets/.git/HEAD"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    (tmp_path / "src/nets/__pycache__").mkdir()
    (tmp_path / "src/nets/__pycache__/block.cpython-311.pyc").write_bytes(b"")
    code = read_code(study_file(tmp_path, "[mine.py, src/nets]"))
    assert sorted(code.files) == ["mine.py", "nets/__init__.py", "nets/deep/block.py", "nets/weights.npy"]
    assert code.files["nets/deep/block.py"] == b"src/nets/deep/block.py"
    assert code.names == ["mine.py", "nets"]
    assert code.origins == {"mine.py": str(tmp_path / "mine.py"), "nets": str(tmp_path / "src/nets")}
    assert code.checksums["mine.py"] == hashlib.sha256(b"x = 1\n").hexdigest()


def test_digest_is_of_names_and_contents():
    digests = {
        Code(files).digest for files in ({}, {"a.py": b""}, {"b.py": b""}, {"a.py": b"1"}, {"a.py": b"", "b.py": b""})
    }
    assert len(digests) == 5
    assert Code({"b.py": b"2", "a.py": b"1"}).digest == Code({"a.py": b"1", "b.py": b"2"}, {"a.py": "/here"}).digest


def test_no_code_is_none(tmp_path: Path):
    (tmp_path / "study.yaml").write_text("name: x\n")
    assert not read_code(StudyFile(tmp_path / "study.yaml"))


BAD = {
    "no list": ("mine.py", "code: input should be a list of files and folders beside the study file"),
    "number": ("[3]", "code: input should be a list of files and folders"),
    "null": ("null", "code: input should be a list of files and folders"),
    "missing": ("[mine.py, nowhere.py]", "code.1: nowhere.py: there is no such file or folder in "),
    "the folder itself": ("[.]", "code.0: .: names no file or folder"),
    "the folder above": ("[..]", "code.0: ..: names no file or folder"),
    "twice": ("[mine.py, again/mine.py]", "code.1: again/mine.py: its name is taken by "),
    "module and package": ("[mine.py, other/mine]", "code.1: other/mine: another entry is the module mine as well"),
    "Python's own": ("[random.py]", "code.0: random.py: would hide Python's own module random"),
    "installed": ("[torch.py]", "code.0: torch.py: would hide the installed module torch ("),
    "ours": ("[lbstudy]", "code.0: lbstudy: would hide the installed module lbstudy ("),
    "no module's name": ("[my-net.py]", "code.0: my-net.py: cannot be imported, for the name of a module is letters"),
    "empty folder": ("[empty]", "code.0: empty: the folder holds no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_unfit_code_is_one_problem(case: str, tmp_path: Path):
    for path in (
        "mine.py",
        "again/mine.py",
        "other/mine/__init__.py",
        "random.py",
        "torch.py",
        "my-net.py",
        "lbstudy/x.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    entries, message = BAD[case]
    with pytest.raises(KeyProblems) as caught:
        read_code(study_file(tmp_path, entries))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_unfit_entries_are_told_with_their_lines(tmp_path: Path):
    file = study_file(tmp_path, "\n- nowhere.py\n- random.py")
    (tmp_path / "random.py").write_bytes(b"")
    with pytest.raises(KeyProblems) as caught:
        read_code(file)
    told = str(file.error(caught.value.problems)).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in told] == ["3", "4"]


def test_what_is_found_in_the_present_folder_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`python -m lbstudy` searches the present folder, where the user's own file lies."""
    (tmp_path / "mine.py").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_code(study_file(tmp_path, "[mine.py]")).names == ["mine.py"]
    assert any(path.endswith("site-packages") for path in site.getsitepackages())  # where `installed` looks


def test_too_much_for_code_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_module, "MOST_BYTES", 10)
    (tmp_path / "mine.py").write_bytes(11 * b"#")
    with pytest.raises(KeyProblems, match=r"data belongs where `dataset.root` points"):
        read_code(study_file(tmp_path, "[mine.py]"))


def copied(folder: Path) -> StudyFile:
    """A study's folder, as `records.code` writes it."""
    files = {"mine.py": b"x = 1\n", "nets/__init__.py": b""}
    for path, content in files.items():
        (folder / FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / FOLDER / path).write_bytes(content)
    (folder / CHECKSUMS).write_text(json.dumps(Code(files).checksums))
    return study_file(folder, "[mine.py, nets]")


def test_in_a_studys_folder_the_copy_counts(tmp_path: Path):
    file = copied(tmp_path)
    (tmp_path / "mine.py").write_bytes(b"x = 2\n")
    (tmp_path / FOLDER / "stray.py").write_bytes(b"")
    code = read_code(file)
    assert code.files == {"mine.py": b"x = 1\n", "nets/__init__.py": b""}
    assert code.origins["mine.py"] == str(tmp_path / FOLDER / "mine.py")


def test_a_changed_copy_is_refused(tmp_path: Path):
    file = copied(tmp_path)
    (tmp_path / FOLDER / "mine.py").write_bytes(b"x = 2\n")
    with pytest.raises(
        KeyProblems, match=r"code/mine.py is not what this study ran with, whose sha256 is [0-9a-f]{64}"
    ):
        read_code(file)
    (tmp_path / FOLDER / "mine.py").unlink()
    with pytest.raises(KeyProblems, match=r"code/mine.py is missing"):
        read_code(file)


@pytest.mark.parametrize("content", ["{", "[1]", '{"../../x.py": "0"}', '{"/etc/x.py": "0"}', "3"])
def test_damaged_checksums_are_refused(content: str, tmp_path: Path):
    file = copied(tmp_path)
    (tmp_path / CHECKSUMS).write_text(content)
    with pytest.raises(KeyProblems, match=r"code.json is damaged"):
        read_code(file)


def test_a_copy_cannot_be_exchanged_on_the_command_line(tmp_path: Path):
    copied(tmp_path)
    file = StudyFile(tmp_path / "study.yaml", {"code": ["other.py"]})
    with pytest.raises(KeyProblems, match=r"this study ran with mine.py, nets; got \['other.py'\]"):
        read_code(file)
