"""Images that a table lists, against the same images in a tree."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets, trees

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


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no column": (lambda t: t.drop(columns="part"), "needs the columns path, label, part; part is missing; got path, label"),
    "no file": (lambda t: t.replace("pictures/2.png", "pictures/x.png"), "row 3: .*pictures/x.png is not there, or no file"),
    "a folder": (lambda t: t.replace("pictures/2.png", "pictures"), "row 3: .*pictures is not there, or no file"),
    "elsewhere": (lambda t: t.replace("pictures/2.png", "../2.png"), "row 3: needs a path below .*; got '../2.png'"),
    "absolute": (lambda t: t.replace("pictures/2.png", "/2.png"), "row 3: needs a path below .*; got '/2.png'"),
    "no label": (lambda t: t.assign(label=["", *t["label"][1:]]), "row 1: .*; got 'pictures/0.png', '', 'train'"),
    "other part": (lambda t: t.replace("test", "val"), "row 5: .* train or test as its part; got .* 'val'"),
    "one class": (lambda t: t.assign(label="9"), "two classes or more are needed; got 9 in .*labels.csv"),
    "class not tested": (lambda t: t.drop(index=[5, 7]), "class 9 has no test images in .*labels.csv"),
    "no rows": (lambda t: t[:0], "two classes or more are needed; got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_named(table: pd.DataFrame, tmp_path: Path, case: str):
    change, message = WRONG[case]
    change(table).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(StudyError, match=f"(?s)dataset.index: .*labels.csv.*{message}|dataset.index: {message}"):
        load(tmp_path, "labels.csv")


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b'a,b\n"'])
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=f"dataset.index: {tmp_path / name} (cannot be parsed|needs the columns)"):
        load(tmp_path, name)


def test_a_missing_table_is_named(tmp_path: Path):
    with pytest.raises(StudyError, match=f"dataset.index: {tmp_path}/labels.csv cannot be read: No such file"):
        load(tmp_path, "labels.csv")


def test_only_image_folders_have_one():
    with pytest.raises(ValueError, match="index is for image_folder; got digits"):
        DatasetSpec(name="digits", index="labels.csv")
