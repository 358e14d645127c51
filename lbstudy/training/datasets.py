"""Where images come from: each dataset read once into uint8 arrays, or an error that says which files to get.

`load` returns the training and the test set. Files may be torchvision's or an image tree (`trees`), told apart by what
lies in the root folder. No torch here but for torchvision's readers; what happens on the device is `data.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lbstudy.parallel.randomness import stream
from lbstudy.study.file import KeyProblems, Keys, Problem
from lbstudy.study.run import DatasetSpec
from lbstudy.study.spec import StudySpec
from lbstudy.training import trees
from lbstudy.training.dataset import Dataset, cache_folder, decoded_folder
from lbstudy.training.decoding import Shape, Track, TreeError
from lbstudy.training.index import list_indexed

# dataset -> (torchvision class, classes, image shape C x H x W, the files torchvision looks for below the root)
TORCHVISION: dict[str, tuple[str, int, tuple[int, int, int], list[str]]] = {
    "cifar10": ("CIFAR10", 10, (3, 32, 32), ["cifar-10-batches-py"]),
    "cifar100": ("CIFAR100", 100, (3, 32, 32), ["cifar-100-python"]),
    "mnist": ("MNIST", 10, (1, 28, 28), ["MNIST/raw"]),
    "fashion_mnist": ("FashionMNIST", 10, (1, 28, 28), ["FashionMNIST/raw"]),
}

ROOT: Keys = ("dataset", "root")
INDEX: Keys = ("dataset", "index")


def shape(spec: DatasetSpec) -> Shape:
    """What the images of a tree are brought to."""
    return Shape(spec.image_size, spec.image_fit == "crop")


PLACES = ("root", "index")
"""Keys that say where the files are, and not what: that is in the identity."""

Datasets = Mapping[str, Dataset]
"""The data of all cells of a study, by `source`."""

Kept = TypeVar("Kept")


def source(spec: DatasetSpec) -> str:
    """What is read for a dataset: equal for specs that differ only in the split or in what is done with the images."""
    keys = {"name", "root", "image_size", "samples"}
    later = {"image_fit": "stretch", "index": None}  # keys that studies had not from the first, and their defaults
    return spec.model_dump_json(include=keys | {key for key, value in later.items() if getattr(spec, key) != value})


def of_run(kept: Mapping[str, Kept], spec: DatasetSpec) -> Kept:
    """The data of a run among those of its study.

    Args:
        kept: what there is of each dataset, by `source`.
        spec: as the run's record has it, which may be from before the data were moved: then they are those that differ
            in the folder alone, or in that and the index.

    Raises:
        KeyError: there are none, or several.
    """
    key = source(spec)
    if key in kept:
        return kept[key]
    for moved in PLACES[:1], PLACES:
        alike = [found for other, found in kept.items() if _without(moved, other) == _without(moved, key)]
        if len(alike) == 1:
            return alike[0]
    raise KeyError(key)


def _without(keys: Sequence[str], source: str) -> dict[str, Any]:
    """A `source` without these keys."""
    return dict(json.loads(source)) | dict.fromkeys(keys)


def load(spec: DatasetSpec, track: Track | None = None) -> Dataset:
    """Read a dataset.

    Args:
        spec: which one, and where.
        track: shows progress while an image tree is decoded for the first time.

    Raises:
        StudyError: files are missing, unreadable, or not what the dataset should be; or it is a user's own, see
            `own_data`.
    """
    if spec.name == "digits":
        return _digits()
    if spec.name == "synthetic":
        return _synthetic(spec.samples)
    if spec.function is not None:
        reason = f"{spec.function} is a function of the user's own, which only commands that train import"
        raise KeyProblems(Problem(("dataset", "name"), reason))
    root = _expanded(spec.root) if spec.root else cache_folder()
    try:
        if spec.index is None and not trees.is_tree(root):
            if spec.name == "image_folder":
                raise _wrong(f"no image tree in {root}: need train/<class>/<image> and test/<class>/<image>")
            dataset = _torchvision(spec.name, root, spec.download)
        else:
            tree = trees.list_files(root) if spec.index is None else _indexed(root, spec.index)
            train, train_labels, test, test_labels, origin = trees.read(tree, shape(spec), decoded_folder(), track)
            dataset = Dataset(train, train_labels, test, test_labels, len(origin.class_names), origin)
            if spec.name in TORCHVISION:
                _check_shape(spec.name, root, dataset)
    except TreeError as error:
        raise _wrong(str(error)) from error
    except OSError as error:
        raise _wrong(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    _check_labels(root, dataset)
    return dataset


def _indexed(root: Path, index: str) -> trees.Tree:
    if not root.is_dir():
        raise _wrong(f"there is no folder {root}")
    try:
        return list_indexed(root, index)
    except OSError as error:
        reason = f"{error.filename or index} cannot be read: {error.strerror or error}"
        raise KeyProblems(Problem(INDEX, reason)) from error
    except TreeError as error:
        raise KeyProblems(Problem(INDEX, str(error))) from error


def load_all(
    study: StudySpec, track: Track | None = None, read: Callable[[DatasetSpec, Track | None], Dataset] = load
) -> Datasets:
    """Read the datasets of a study's cells, each once: several where `dataset` or a part of it is a factor.

    Args:
        study: the study.
        track: shows progress; see `load`, and while images that lie in a file are looked at for the first time.
        read: reads one of them.

    Raises:
        StudyError: see `load`.
    """
    specs = {source(part.dataset): part.dataset for part in study.variants()}
    found = {name: read(spec, track).settled(spec.residency) for name, spec in specs.items()}
    for dataset in found.values():
        if dataset.mapped:  # to look at what fits into memory takes no time to speak of
            dataset.look(track)
    return found


def _expanded(root: str) -> Path:
    """The folder, `~` replaced.

    Raises:
        StudyError: there is no home.
    """
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise _wrong(f"{root}: {error}") from error


def identities(study: StudySpec, data: Datasets) -> dict[str, dict[str, Any]]:
    """What a study's data are known again by, each dataset by its name and what else changes its images; where they
    are read from counts only where places are compared.

    Args:
        study: the study.
        data: of all its cells.
    """
    compared = PLACES if "dataset" in study.factors else [key for key in PLACES if f"dataset.{key}" in study.factors]
    anywhere = dict.fromkeys(key for key in PLACES if key not in compared)
    found = {}
    for part in study.variants():
        found[source(part.dataset.model_copy(update=anywhere))] = data[source(part.dataset)].identity
    return found


def _wrong(message: str) -> KeyProblems:
    """Something is wrong with the files."""
    return KeyProblems(Problem(ROOT, message))


def validation_samples(spec: DatasetSpec, train_samples: int) -> int:
    """How many training samples validate.

    Raises:
        StudyError: the validation set would leave no training sample.
    """
    count = spec.validation_samples(train_samples)
    if not 0 < count < train_samples:
        asked = f"{spec.validation_size} asks for {count} of {train_samples} training samples"
        reason = f"{asked}; it must leave some on both sides"
        raise KeyProblems(Problem(("dataset", "validation_size"), reason))
    return count


def training_samples(spec: DatasetSpec, dataset: Dataset) -> int:
    """Training samples beside the validation samples."""
    return len(dataset.train_labels) - validation_samples(spec, len(dataset.train_labels))


def input_shape(spec: DatasetSpec, dataset: Dataset) -> tuple[int, int, int]:
    """Channels, height and width of what a network gets."""
    channels, height, width = dataset.train_images.shape[1:]
    return (channels, height, width) if spec.crop_size is None else (channels, spec.crop_size, spec.crop_size)


def misfits(study: StudySpec, dataset: Dataset) -> Iterator[Problem]:
    """What is wrong between a variant of a study and its data: batch sizes larger than the training split, splits that
    are too small for their classes, or leave nothing on one side, and crops larger than the images."""
    height, width = dataset.train_images.shape[2:]
    if study.dataset.crop_size and study.dataset.crop_size > min(height, width):
        reason = f"{study.dataset.crop_size} pixels are more than the images have, {height}x{width}"
        yield Problem(("dataset", "crop_size"), reason)
    try:
        validation_samples(study.dataset, len(dataset.train_labels))
    except KeyProblems as error:
        yield from error.problems
        return
    samples = training_samples(study.dataset, dataset)
    validating = len(dataset.train_labels) - samples
    if min(samples, validating) < dataset.classes:
        reason = (
            f"leaves {samples} samples to train and {validating} to validate; a stratified split needs at least one "
            f"of each of the {dataset.classes} classes on both sides; got {study.dataset.validation_size}"
        )
        yield Problem(("dataset", "validation_size"), reason)
    if large := sorted({cell.batch_size for cell in study.list_cells() if cell.batch_size > samples}):
        reason = (
            f"{', '.join(map(str, large))} is more than the {samples} training samples "
            f"that dataset {study.dataset.name} has beside its validation samples"
        )
        yield Problem(("cells", "batch_size"), reason)


@cache
def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, upsampled from 8x8 to 32x32 (bilinear); a stratified fifth tests. They
    are made once in a process, so nobody may write into them."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small, labels = load_digits(return_X_y=True)
    pixels = np.round(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in pixels]
    images = np.stack(large)[:, None]
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    labels = labels.astype(np.int64)
    arrays = images[train], labels[train], images[test], labels[test]
    for array in arrays:
        array.setflags(write=False)
    return Dataset(*arrays, classes=10)


def _synthetic(samples: int) -> Dataset:
    """Ten classes of 3x32x32 noise around a pattern each: fast to make, and learnable. A quarter more tests."""
    rng = stream(0, "synthetic", samples)
    patterns = rng.integers(64, 192, size=(10, 3, 32, 32))

    def draw(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = np.arange(count, dtype=np.int64) % 10
        noisy = patterns[labels] + rng.normal(0, 48, size=(count, 3, 32, 32))
        return noisy.clip(0, 255).astype(np.uint8), labels

    train, test = draw(samples), draw(max(10, samples // 4))
    return Dataset(train[0], train[1], test[0], test[1], classes=10)


def _torchvision(name: str, root: Path, download: bool) -> Dataset:
    import torchvision.datasets

    class_name, classes, shape, files = TORCHVISION[name]
    reader = getattr(torchvision.datasets, class_name)
    try:
        sets = [reader(root=str(root), train=train, download=download) for train in (True, False)]
    except Exception as error:  # torchvision's readers unpickle, assert and parse: a damaged file raises anything
        looked_for = ", ".join(str(root / file) for file in files)
        if any((root / file).exists() for file in files) and "not found" not in str(error):
            raise _wrong(f"{name} in {looked_for} is damaged: {_one_line(error)}") from error
        raise _wrong(
            f"{name} is not in {root}: looked for {looked_for} (torchvision's files) and for "
            f"{root / 'train'}, {root / 'test'} (an image tree). Point --data at a copy, or set dataset.download "
            f"to true to let torchvision fetch it ({_one_line(error)})"
        ) from error
    arrays: list[Any] = []
    for part in sets:
        images = np.asarray(part.data).reshape(-1, *shape[1:], shape[0]).transpose(0, 3, 1, 2)
        arrays += [np.ascontiguousarray(images, dtype=np.uint8), np.asarray(part.targets, dtype=np.int64)]
    return Dataset(arrays[0], arrays[1], arrays[2], arrays[3], classes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_labels(root: Path, dataset: Dataset) -> None:
    """Make sure that every image has a label of a known class, and that both parts hold the same kind of image."""
    parts = {
        "training": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    for part, (images, labels) in parts.items():
        if len(images) != len(labels):
            raise _wrong(f"the {part} set in {root} has {len(images)} images, but {len(labels)} labels")
        if not len(labels) or labels.min() < 0 or labels.max() >= dataset.classes:
            found = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
            raise _wrong(f"the {part} labels in {root} should be 0 to {dataset.classes - 1}; got {found}")
    shapes = [images.shape[1:] for images, _ in parts.values()]
    if shapes[0] != shapes[1]:
        first, second = ("x".join(map(str, shape)) for shape in shapes)
        raise _wrong(f"the training images in {root} are {first}, but the test images {second}")


def _check_shape(name: str, root: Path, dataset: Dataset) -> None:
    _, classes, shape, _ = TORCHVISION[name]
    found = dataset.train_images.shape[1:]
    if (dataset.classes, found) != (classes, shape):
        raise _wrong(
            f"the image tree in {root} is not {name}: it has {dataset.classes} classes of "
            f"{'x'.join(map(str, found))}, not {classes} of {'x'.join(map(str, shape))}"
        )
