"""Datasets, split, order, augmentation and slices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets
from lbstudy.training.data import CUTOUT, PAD, EpochImages, crop, cutout, flip, place, stratified_choice, worker_slice


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image tree of two classes, 8 x 6 pixels, whose pixel values are their label's hundreds plus a number."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for part, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "tree" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 6), (100 * label + number,) * 3).save(folder / f"{number:03d}.png")
    return tmp_path / "tree"


def tree_spec(root: Path, **keys: object) -> DatasetSpec:
    return DatasetSpec.model_validate({"name": "image_folder", "root": str(root), "validation_size": 4, **keys})


def test_image_tree_is_read_once_and_cached(tree: Path):
    tracked = []
    for _ in range(2):
        data = datasets.load(tree_spec(tree), lambda files, count, doing: tracked.append(count) or files)
    assert tracked == [28]  # decoded the first time only
    assert data.train_images.shape == (20, 3, 6, 8)
    assert data.train_images[:, 0, 0, 0].tolist() == [*range(10), *range(100, 110)]
    assert data.test_labels.tolist() == [0] * 4 + [1] * 4
    assert datasets.load(tree_spec(tree, image_size=16)).train_images.shape == (20, 3, 16, 16)


def test_data_that_were_moved_are_found_for_runs_of_before():
    """A record says where its data lay when it was made."""
    here, size = DatasetSpec(name="image_folder", root="/here"), {"image_size": 8}
    assert datasets.of_run({datasets.source(here): 1}, here) == 1
    assert datasets.of_run({datasets.source(here): 1}, here.model_copy(update={"root": "/before"})) == 1
    with pytest.raises(KeyError):
        datasets.of_run({datasets.source(here): 1}, here.model_copy(update=size))
    two = {datasets.source(here): 1, datasets.source(here.model_copy(update={"root": "/there"})): 2}
    with pytest.raises(KeyError):
        datasets.of_run(two, here.model_copy(update={"root": "/before"}))


def test_changed_tree_is_decoded_again(tree: Path):
    assert len(datasets.load(tree_spec(tree)).train_labels) == 20
    (tree / "train" / "cat" / "000.png").unlink()
    assert len(datasets.load(tree_spec(tree)).train_labels) == 19


def test_what_is_wrong_with_a_tree_is_named(tree: Path):
    with pytest.raises(StudyError, match="not cifar10: it has 2 classes of 3x6x8, not 10 of 3x32x32"):
        datasets.load(tree_spec(tree, name="cifar10"))
    Image.new("RGB", (9, 6)).save(tree / "train" / "dog" / "odd.png")
    with pytest.raises(StudyError, match=r"odd.png is 6x9, the images before it are 6x8"):
        datasets.load(tree_spec(tree))
    (tree / "train" / "dog" / "odd.png").write_bytes(b"not an image")
    with pytest.raises(StudyError, match=r"odd.png is no readable image"):
        datasets.load(tree_spec(tree))
    (tree / "test" / "bird").mkdir()
    with pytest.raises(StudyError, match="different classes: bird"):
        datasets.load(tree_spec(tree))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "image_folder"])
def test_missing_files_are_named(tmp_path: Path, name: str):
    with pytest.raises(StudyError) as raised:
        datasets.load(DatasetSpec(name=name, root=str(tmp_path)))
    assert str(tmp_path) in str(raised.value)
    assert "train" in str(raised.value)


def test_torchvision_files_are_told_apart_from_a_tree(tmp_path: Path):
    """MNIST's own format, made by hand: magic number, sizes, bytes."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(labels, 28 * 28).astype(np.uint8)
        sizes = b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes((2051).to_bytes(4, "big") + sizes + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((2049).to_bytes(4, "big") + sizes[:4] + labels.tobytes())
    data = datasets.load(DatasetSpec(name="mnist", root=str(tmp_path)))
    assert data.train_images.shape == (30, 1, 28, 28)
    assert data.test_images[13, 0, 5, 5] == 3


def test_split_is_stratified_by_seed_and_leaves_no_sample_out():
    spec = DatasetSpec(name="digits", validation_size=200)
    full = datasets.load(spec)
    one, same, other = (place(full, spec, seed) for seed in (0, 0, 1))
    assert (len(one.train), len(one.validation), len(one.test)) == (1237, 200, 360)
    assert torch.equal(one.validation.rows, same.validation.rows)
    assert not torch.equal(one.validation.labels, other.validation.labels)
    shares = torch.bincount(one.validation.labels) - torch.from_numpy(np.bincount(full.train_labels)) * 200 / 1437
    assert shares.abs().max() < 1
    pixels = torch.cat([part.at(slice(None)) for part in (one.train, one.validation)]).flatten(1).sum(1).sort().values
    assert pixels.tolist() == sorted(full.train_images.reshape(1437, -1).sum(1).tolist())


def test_stratified_choice_takes_exactly_so_many():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 1)
    chosen = stratified_choice(labels, 5, np.random.default_rng(0))
    assert chosen.sum() == 5
    assert np.bincount(labels[chosen], minlength=3)[0] in (3, 4)


@pytest.mark.parametrize("size", [1437, 5, 0.999])
def test_impossible_split_is_refused(size: float):
    spec = DatasetSpec(name="digits", validation_size=size)
    with pytest.raises(StudyError, match="dataset.validation_size"):
        place(datasets.load(spec), spec, 0)


def test_normalised_training_images_have_mean_zero_and_deviation_one():
    spec = DatasetSpec(name="synthetic", samples=400)
    data = place(datasets.load(spec), spec, 0)
    images = data.plain(data.train, slice(None), torch.float64)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_epoch_is_a_function_of_seed_and_epoch():
    spec = DatasetSpec(name="digits", augment=("crop", "flip", "cutout"))
    data = place(datasets.load(spec), spec, 0)
    everything = torch.arange(len(data.train))

    def epoch(seed: int, number: int) -> EpochImages:
        return EpochImages(data, spec, seed, number, torch.float32)

    one, other_epoch, other_seed = epoch(1, 1), epoch(1, 2), epoch(2, 1)
    assert sorted(one.order.tolist()) == everything.tolist()
    assert not torch.equal(one.order, other_epoch.order)
    assert not torch.equal(one.order, other_seed.order)
    whole = one.images(everything)
    parts = torch.cat([epoch(1, 1).images(part) for part in everything.split(100)])
    assert torch.equal(whole, parts)
    plain = EpochImages(data, DatasetSpec(name="digits"), 1, 1, torch.float32).images(everything)
    assert not torch.equal(whole, plain)


def test_crop_shifts_by_its_offset():
    images = torch.randint(1, 255, (5, 2, 6, 6), dtype=torch.uint8)
    offsets = torch.tensor([0, 1, PAD, PAD + 1, 2 * PAD])
    padded = torch.zeros(5, 2, 6 + 2 * PAD, 6 + 2 * PAD, dtype=torch.uint8)
    padded[:, :, PAD:-PAD, PAD:-PAD] = images
    order = torch.tensor([3, 1, 0, 4, 2])
    result = crop(images[order], offsets, offsets.flip(0))
    for index, (top, left) in enumerate(zip(offsets.tolist(), offsets.flip(0).tolist(), strict=True)):
        assert torch.equal(result[index], padded[order[index], :, top : top + 6, left : left + 6])


def test_crop_and_flip_of_no_images_are_none():
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert crop(flip(none, nothing), nothing, nothing).shape == (0, 3, 32, 32)


def test_flip_mirrors_about_half_of_the_images():
    spec = DatasetSpec(name="digits", augment=("flip",))
    data = place(datasets.load(spec), spec, 0)
    everything = torch.arange(len(data.train))
    epoch = EpochImages(data, spec, 0, 1, torch.float32)
    plain = EpochImages(data, DatasetSpec(name="digits"), 0, 1, torch.float32).images(everything)
    result = epoch.images(everything)
    same = (result == plain).flatten(1).all(1)
    mirrored = (result == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0.4 < mirrored.double().mean() < 0.6


def test_cutout_erases_a_square_that_may_leave_the_image():
    images = torch.ones(2, 3, 32, 32)
    result = cutout(images, torch.tensor([16, 0]), torch.tensor([20, 31]))
    assert (result[0] == 0).sum() == 3 * CUTOUT * CUTOUT
    assert result[0, 0, 8:24, 12:28].sum() == 0
    assert (result[1] == 0).sum() == 3 * (CUTOUT // 2) * (CUTOUT // 2 + 1)


@pytest.mark.parametrize("samples", [1, 7, 64, 129])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("unit", [1, 16])
def test_slices_partition_the_minibatch_at_multiples_of_the_unit(samples: int, workers: int, unit: int):
    slices = [worker_slice(samples, rank, workers, unit) for rank in range(workers)]
    assert [p for s in slices for p in range(s.start, s.stop)] == list(range(samples))
    assert all(s.start % unit == 0 or s.start == samples for s in slices)
    sizes = [-(-(s.stop - s.start) // unit) for s in slices]
    assert max(sizes) - min(sizes) <= 1
