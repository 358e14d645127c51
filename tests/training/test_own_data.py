"""Data of a user's own: what a function may return, and one clear error for what it may not."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbstudy.methods import user_code
from lbstudy.study.code import Code
from lbstudy.study.file import KeyProblems
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets, own_data
from lbstudy.training.data import place

SPEC = DatasetSpec(name="mine:data", validation_size=0.25)


@pytest.fixture(autouse=True)
def afterwards_none() -> Iterator[None]:
    yield
    user_code.activate(Code())


def returning(monkeypatch: pytest.MonkeyPatch, returned: Any) -> None:
    """`mine:data` returns this."""
    user_code.activate(Code({"mine.py": b"def data():\n    return RETURNED\n"}))
    import mine  # type: ignore[import-not-found]

    monkeypatch.setattr(mine, "RETURNED", returned, raising=False)


def arrays(**changes: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    good = {
        "train_images": draw.integers(0, 256, (12, 3, 5, 4), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": draw.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    return {**good, **changes}


@pytest.mark.parametrize("form", [dict, lambda d: tuple(d.values()), lambda d: list(d.values())])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_arrays_are_taken(form: Callable[[Any], Any], dtype: Any, monkeypatch: pytest.MonkeyPatch):
    given = arrays(train_labels=(np.arange(12) % 3).astype(dtype))
    returning(monkeypatch, form(given))
    found = own_data.load(SPEC)
    assert found.classes == 3
    assert found.train_labels.dtype == np.int64
    for part in own_data.PARTS:
        np.testing.assert_array_equal(getattr(found, part), given[part])
    placed = place(found, SPEC, 0)
    assert placed.shape == (3, 5, 4)


def test_images_without_channels_have_one(monkeypatch: pytest.MonkeyPatch):
    grey = arrays()
    grey |= {part: grey[part][:, 0] for part in ("train_images", "test_images")}
    returning(monkeypatch, grey)
    assert own_data.load(SPEC).train_images.shape == (12, 1, 5, 4)


def test_mapped_files_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither on loading nor in what goes to the object store beside the pixels themselves."""
    given = arrays()
    np.save(tmp_path / "x.npy", given["train_images"])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    returning(monkeypatch, given | {"train_images": mapped})
    found = own_data.load(SPEC)
    assert np.shares_memory(found.train_images, mapped)
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
    assert any(np.shares_memory(np.frombuffer(buffer.raw(), np.uint8), mapped) for buffer in buffers)
    np.testing.assert_array_equal(place(found, SPEC, 0).test.pixels, given["test_images"])


def test_root_is_handed_over_where_it_is_asked_for():
    text = "import numpy as np\ndef data(root):\n    part = np.full((2, 4, 4), int(root), np.uint8), np.arange(2)\n    return *part, *part\n"
    user_code.activate(Code({"mine.py": text.encode()}))
    assert own_data.load(DatasetSpec(name="mine:data", root="7")).test_images.max() == 7


def test_what_looks_at_results_does_not_import_it():
    with pytest.raises(KeyProblems, match="mine:data is a function of the user's own"):
        datasets.load(SPEC)


ZEROS = np.zeros((12, 3, 5, 4), np.uint8)
BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "should return train_images, train_labels, test_images, test_labels, as a tuple or a dictionary, but returns a NoneType"),
    "two values": ((1, 2), "but returns 2 values"),
    "other names": ({"x": 1, "y": 2}, "but returns a dictionary of x, y"),
    "a list of numbers": (arrays(train_labels=[0, 1, 2] * 4), "returns a list as train_labels, but should return a numpy array"),
    "floats": (arrays(train_images=ZEROS / 255), "returns train_images as float64, but pixels should be uint8, from 0 to 255"),
    "vectors": (arrays(train_images=np.zeros((12, 60), np.uint8)), "returns train_images of shape 12x60, but should return N x C x H x W or N x H x W"),
    "no pixels": (arrays(train_images=np.zeros((12, 3, 0, 4), np.uint8)), "returns train_images of shape 12x3x0x4"),
    "channels last": (arrays(train_images=np.zeros((12, 5, 5, 3), np.uint8)), "returns train_images of shape 12x5x5x3, but should return N x C x H x W; `.transpose(0, 3, 1, 2)` puts"),
    "float labels": (arrays(train_labels=np.zeros(12)), "returns train_labels as float64, but labels should be integers"),
    "one-hot labels": (arrays(test_labels=np.eye(6, dtype=int)), "returns test_labels of shape 6x6, but should return a label an image"),
    "too few labels": (arrays(train_labels=np.arange(11) % 3), "returns 12 train_images, but 11 train_labels"),
    "no test images": (arrays(test_images=ZEROS[:0], test_labels=np.arange(0)), "returns no test_images"),
    "other channels": (arrays(test_images=np.zeros((6, 1, 5, 4), np.uint8)), "returns train_images of 3x5x4, but test_images of 1x5x4"),
    "negative label": (arrays(train_labels=np.arange(12) % 3 - 1), "returns a label -1, but labels should count from 0"),
    "one class": (arrays(train_labels=np.zeros(12, int), test_labels=np.zeros(6, int)), "returns train_labels of one class"),
    "class without images": (arrays(train_labels=np.arange(12) % 3 * 2), "returns train_labels from 0 to 4, but no image of class 1"),
    "labels from 1": (arrays(train_labels=np.arange(12) % 3 + 1), "returns train_labels from 0 to 3, but no image of class 0"),
    "unknown test label": (arrays(test_labels=np.arange(6)), "returns test_labels up to 5, but train_labels from 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_data_is_one_error(case: str, monkeypatch: pytest.MonkeyPatch):
    returned, message = BAD[case]
    returning(monkeypatch, returned)
    with pytest.raises(KeyProblems) as caught:
        own_data.load(SPEC)
    assert str(caught.value).startswith("dataset.name: mine:data ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def data(path): pass", "mine:data must take nothing, or `root`, but takes (path)"),
        ("data = 3", "mine:data is a int, not a function that returns arrays"),
        ("def date(): pass", "there is no attribute 'data' in mine; did you mean date?"),
        ("def data():\n    return 1 / 0", "mine:data fails: ZeroDivisionError: division by zero\n"),
    ],
)
def test_wrong_functions_are_one_error(text: str, message: str):
    user_code.activate(Code({"mine.py": text.encode()}, {"mine.py": "/home/me/mine.py"}))
    with pytest.raises(KeyProblems) as caught:
        own_data.load(SPEC)
    assert message in str(caught.value)
    assert ('File "/home/me/mine.py", line 2, in data' in str(caught.value)) is ("1 / 0" in text)
