"""What is said of a dataset, against numpy's own sums."""

from dataclasses import replace

import numpy as np
import pytest

from lbstudy.training import dataset as data_set
from lbstudy.training.dataset import Dataset
from lbstudy.training.summary import summarise
from lbstudy.training.trees import LeftOut, Origin


@pytest.fixture
def dataset() -> Dataset:
    draw = np.random.default_rng(0)
    train, test = (draw.integers(0, 256, (count, 3, 5, 4), dtype=np.uint8) for count in (30, 10))
    return Dataset(train, np.arange(30) % 3, test, np.arange(10) % 3, classes=3)


def test_numbers_are_those_of_numpy(dataset: Dataset):
    found, pixels = summarise(dataset), dataset.train_images / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    assert (found.train, found.test, found.shape, found.per_class) == (30, 10, (3, 5, 4), (10, 10, 10))
    assert (found.in_both, found.repeated) == (0, 0)


def test_images_in_both_parts_are_counted(dataset: Dataset):
    test = dataset.test_images.copy()
    test[3], test[7] = dataset.train_images[4], dataset.train_images[4]
    train = dataset.train_images.copy()
    train[20] = train[4]
    found = summarise(replace(dataset, test_images=test, train_images=train))
    assert (found.in_both, found.repeated) == (2, 1)
    text = "\n".join(found.sentences())
    assert "2 of 10 test images (20.0%) are training images too" in text
    assert "1 of 30 training images repeat another one" in text


def test_what_is_not_used_is_said(dataset: Dataset):
    origin = Origin(("a", "b", "c"), {"L": 39, "RGB": 1}, {".gif": LeftOut(1200, "train/a/x.gif")})
    text = "\n".join(summarise(replace(dataset, origin=origin)).sentences())
    assert "stored as L (39), RGB (1)" in text
    assert "not used: 1,200 .gif (first: train/a/x.gif)" in text


@pytest.mark.parametrize("change", ["pixel", "label", "order", "part"])
def test_any_other_content_is_told_apart(dataset: Dataset, change: str):
    train, labels, test = dataset.train_images.copy(), dataset.train_labels.copy(), dataset.test_images.copy()
    if change == "pixel":
        train[0, 0, 0, 0] ^= 1
    elif change == "label":
        labels[0] = 2
    elif change == "order":
        train[[0, 1]] = train[[1, 0]]
    else:
        test[0] += 1
    other = Dataset(train, labels, test, dataset.test_labels, classes=3)
    assert other.identity["sha256"] != dataset.identity["sha256"]
    assert dataset.identity == Dataset(*(getattr(dataset, p) for p in PARTS), classes=3).identity


PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def test_images_come_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_set, "PIECE", 12)
    images = np.arange(10 * 3, dtype=np.uint8).reshape(10, 3, 1, 1)
    pieces = list(data_set.pieces(images))
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), images)
    sums, squares = Dataset(images, np.arange(10), images, np.arange(10), 10).channel_sums
    np.testing.assert_array_equal(sums, images[..., 0, 0])
    np.testing.assert_array_equal(squares, images[..., 0, 0].astype(int) ** 2)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (3, 70, 90)])
def test_sums_of_the_brightest_images_are_exact(shape: tuple[int, int, int]):
    images = np.full((4, *shape), 255, np.uint8)
    images[1] = np.random.default_rng(0).integers(0, 256, shape)
    sums, squares = Dataset(images, np.arange(4), images, np.arange(4), 4).channel_sums
    np.testing.assert_array_equal(sums, images.sum((2, 3), dtype=np.int64))
    np.testing.assert_array_equal(squares, (images.astype(np.int64) ** 2).sum((2, 3)))
