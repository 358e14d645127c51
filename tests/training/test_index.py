"""Images that a table lists, against the same images in a tree."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec
from lbstudy.study.spec import StudySpec
from lbstudy.training import datasets, trees
from tests.conftest import tiny_study

ROWS = [
    (f"pictures/{number}.png", label, part)
    for number, (label, part) in enumerate((a, b) for b in trees.PARTS for a in ("10", "9", "10", "9"))
]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Eight images of two classes, and what they are."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for path, _, _ in ROWS:
        Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).save(tmp_path / path)
    return pd.DataFrame(ROWS, columns=["path", "label", "part"])


def load(root: Path, index: str | None) -> datasets.Dataset:
    return datasets.load(DatasetSpec(name="image_folder", root=str(root), index=index))


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_a_table_is_as_good_as_a_tree(table: pd.DataFrame, tmp_path: Path, name: str):
    table["more"] = 0.5
    table.to_csv(tmp_path / name, index=False) if name.endswith("csv") else table.to_parquet(tmp_path / name)
    found = load(tmp_path, name)
    for path, label, part in ROWS:
        folder = tmp_path / "tree" / part / f"{int(label):03}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(path).name).symlink_to(tmp_path / path)
    tree = load(tmp_path / "tree", None)
    assert found.origin.class_names == ("9", "10")  # by size: as text 10 would be the first
    for images, labels in (("train_images", "train_labels"), ("test_images", "test_labels")):
        by_class = np.argsort(getattr(found, labels), kind="stable")
        np.testing.assert_array_equal(getattr(found, labels)[by_class], getattr(tree, labels))
        np.testing.assert_array_equal(getattr(found, images)[by_class], getattr(tree, images))
    assert load(tmp_path, str(tmp_path / name)).identity == found.identity


def test_parquet_may_hold_numbers(table: pd.DataFrame, tmp_path: Path):
    table.assign(label=table["label"].astype(int)).to_parquet(tmp_path / "labels.parquet")
    assert load(tmp_path, "labels.parquet").origin.class_names == ("9", "10")


def test_another_label_makes_other_data(table: pd.DataFrame, tmp_path: Path):
    table.to_csv(tmp_path / "labels.csv", index=False)
    first = load(tmp_path, "labels.csv")
    table.loc[0, "label"] = "9"
    table.to_csv(tmp_path / "labels.csv", index=False)
    assert load(tmp_path, "labels.csv").identity["sha256"] != first.identity["sha256"]


def duplicated(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table["label"]], axis=1)


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no column": (lambda t: t.drop(columns="part"), "needs the columns path, label, part, each once; got 'path', 'label'"),
    "a column twice": (duplicated, "needs the columns path, label, part, each once; got 'path', 'label', 'part', 'label'"),
    "no file": (lambda t: t.replace("pictures/2.png", "pictures/x.png"), "row 3 .*pictures/x.png is not there, no file"),
    "a folder": (lambda t: t.replace("pictures/2.png", "folder.png"), "row 3 .*folder.png is not there, no file"),
    "elsewhere": (lambda t: t.replace("pictures/2.png", "../2.png"), "row 3 .*path should begin at .*; got '../2.png'"),
    "absolute": (lambda t: t.replace("pictures/2.png", "/2.png"), "row 3 .*path should begin at .*; got '/2.png'"),
    "no path": (lambda t: t.replace("pictures/2.png", ""), "row 3 .*path should begin at .*; got ''"),
    "no image": (lambda t: t.replace("pictures/2.png", "2.eps"), "row 3 .*path should end in one of .*; got '2.eps'"),
    "twice": (lambda t: t.replace("pictures/2.png", "./pictures/0.png"), "row 3 .*'./pictures/0.png' is in row 1 already"),
    "too long": (lambda t: t.replace("pictures/2.png", 300 * "x" + ".png"), "row 3 .*is not there, no file, or out of reach"),
    "no label": (lambda t: t.assign(label=["", *t["label"][1:]]), "row 1 .*label should be a name .*; got ''"),
    "space": (lambda t: t.assign(label=["9 ", *t["label"][1:]]), "row 1 .*label should be a name .*; got '9 '"),
    "other part": (lambda t: t.replace("test", "Test"), "row 5 .*part should be train or test; got 'Test'"),
    "one class": (lambda t: t.assign(label="9"), "two classes or more are needed; got 9 in .*labels"),
    "class not tested": (lambda t: t.drop(index=[5, 7]), "class '9' has no test images in .*labels"),
    "no rows": (lambda t: t[:0], "two classes or more are needed; got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_named(table: pd.DataFrame, tmp_path: Path, case: str):
    (tmp_path / "folder.png").mkdir()
    change, message = WRONG[case]
    change(table).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(StudyError, match=f"^dataset.index: .*{message}"):
        load(tmp_path, "labels.csv")


@pytest.mark.parametrize("label", ["category", "Int64", "object"])
def test_a_value_that_is_missing_is_no_label(table: pd.DataFrame, tmp_path: Path, label: str):
    table["label"] = pd.Series(["9", None] * 4).astype(label)
    table.to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(StudyError, match=r"dataset.index: .*row 2 below the header: label should be a name .*; got ''"):
        load(tmp_path, "labels.parquet")


def whole_table(folder: Path) -> bytes:
    pd.DataFrame(ROWS, columns=["path", "label", "part"]).to_parquet(folder / "whole")
    return (folder / "whole").read_bytes()


def test_parquet_is_known_by_its_content(table: pd.DataFrame, tmp_path: Path):
    table.assign(pixels=b"\xff").to_parquet(tmp_path / "labels.PQ")
    assert len(load(tmp_path, "labels.PQ").train_labels) == 4


NO_TABLES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda folder: b"",
    "binary": lambda folder: b"\x00\xff\xfe",
    "open quote": lambda folder: b'path,label,part\n"',
    "short row": lambda folder: b"path,label,part\na.png,cat\n",
    "long row": lambda folder: b"path,label,part\na.png,cat,train,\n",
    "no UTF-8": lambda folder: "path,label,part\na.png,\xe4,train\n".encode("latin-1"),
    "compressed": lambda folder: gzip.compress(b"path,label,part\n")[:20],
    "cut": lambda folder: whole_table(folder)[:-40],
    "damaged": lambda folder: b"PAR1" + bytes(200) + whole_table(folder)[204:],
}


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet", "labels.csv.gz"])
@pytest.mark.parametrize("content", NO_TABLES)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_bytes(NO_TABLES[content](tmp_path))
    with pytest.raises(
        StudyError, match=f"^dataset.index: {tmp_path / name} (is no CSV table|needs the columns)"
    ) as found:
        load(tmp_path, name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["labels.csv", "folder", "~/labels.csv"])
def test_a_missing_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StudyError, match=r"dataset.index: /.*(labels.csv|folder) is not there, no file") as found:
        load(tmp_path, name)
    assert ("/home/of/nobody/labels.csv" in str(found.value)) == name.startswith("~")


def test_a_missing_folder_is_no_fault_of_the_table(tmp_path: Path):
    with pytest.raises(StudyError, match=f"dataset.root: there is no folder {tmp_path}/nowhere"):
        load(tmp_path / "nowhere", "labels.csv")


def test_data_and_their_table_may_move(table: pd.DataFrame, tmp_path: Path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "pictures").symlink_to(tmp_path / "pictures")
        table.to_csv(tmp_path / place / "labels.csv", index=False)

    def study(place: str) -> StudySpec:
        where = {"root": str(tmp_path / place), "index": str(tmp_path / place / "labels.csv")}
        return tiny_study(dataset={"name": "image_folder", "validation_size": 2, **where})

    first, second = (datasets.load_all(study(place)) for place in ("here", "there"))
    assert datasets.identities(study("here"), first) == datasets.identities(study("there"), second)
    assert datasets.of_run(second, study("here").dataset) is next(iter(second.values()))
    folder = StudyFolder.create(tmp_path / "study", study("here"))
    folder.require_extension(study("there"))


def test_only_image_folders_have_one():
    with pytest.raises(ValueError, match="index is for image_folder; got digits"):
        DatasetSpec(name="digits", index="labels.csv")
