"""Data of a user's own: what a function returns, checked like what our own readers return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbstudy.methods.declaration import MethodError, attribute, named
from lbstudy.methods.user_code import told, traceback_of
from lbstudy.study.file import KeyProblems, Problem
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets
from lbstudy.training.dataset import Dataset
from lbstudy.training.decoding import Track

PARTS = ("train_images", "train_labels", "test_images", "test_labels")
CHANNELS = (1, 3, 4)


def load(spec: DatasetSpec, track: Track | None = None) -> Dataset:
    """Read a dataset: one of ours, see `datasets.load`, or a user's."""
    if spec.function is None:
        return datasets.load(spec, track)
    arrays: dict[str, Any] = read(spec.function, spec.root)
    return Dataset(**arrays, classes=int(arrays["train_labels"].max()) + 1)


class _Wrong(Exception):
    """What is wrong with the function or its arrays, as the rest of a sentence."""


def read(name: str, root: str | None) -> dict[str, NDArray[Any]]:
    """The arrays of a user's function, as they should be.

    Args:
        name: `module:function`; it takes nothing, or `root`.
        root: `dataset.root` of the study, for a function that asks for it.

    Returns:
        By the names of PARTS: images as uint8, N x C x H x W, and labels as int64, N. What lies in a mapped file stays
        there.

    Raises:
        KeyProblems: the function cannot be called so, raises an error, or returns something else.
    """
    try:
        arrays = _named(_returned(name, root))
        found = {part: _images(part, a) if "images" in part else _labels(part, a) for part, a in arrays.items()}
        _fit_together(found)
    except _Wrong as error:
        raise KeyProblems(Problem(("dataset", "name"), f"{name} {error}")) from error
    except MethodError as error:
        raise KeyProblems(Problem(("dataset", "name"), told(error))) from error
    return found


def _returned(name: str, root: str | None) -> Any:
    function = attribute("dataset", name)
    if not callable(function):
        raise _Wrong(f"is a {type(function).__name__}, not a function that returns arrays")
    signature = inspect.signature(function)
    arguments = {"root": root} if "root" in signature.parameters else {}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise _Wrong(f"must take nothing, or `root`, but takes {signature}") from error
    try:
        return function(**arguments)
    except Exception as error:  # whatever the user's function does wrong is the user's to read
        raise _Wrong(f"fails: {named(error)}\n{traceback_of(error)}".rstrip()) from error


def _named(returned: Any) -> dict[str, Any]:
    wanted = f"should return {', '.join(PARTS)}, as a tuple or a dictionary"
    if isinstance(returned, Mapping):
        if set(returned) != set(PARTS):
            raise _Wrong(f"{wanted}, but returns a dictionary of {', '.join(map(str, returned)) or 'nothing'}")
        return {part: returned[part] for part in PARTS}
    if not isinstance(returned, tuple | list) or len(returned) != len(PARTS):
        found = f"{len(returned)} values" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise _Wrong(f"{wanted}, but returns {found}")
    return dict(zip(PARTS, returned, strict=True))


def _array(part: str, array: Any) -> NDArray[Any]:
    if not isinstance(array, np.ndarray):
        raise _Wrong(f"returns a {type(array).__name__} as {part}, but should return a numpy array")
    return np.asarray(array)  # of a mapped file: the same memory, without a class of its own


def _images(part: str, array: Any) -> NDArray[np.uint8]:
    images = _array(part, array)
    shape = "x".join(map(str, images.shape))
    if images.dtype != np.uint8:
        raise _Wrong(f"returns {part} as {images.dtype}, but pixels should be uint8, from 0 to 255")
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise _Wrong(f"returns {part} of shape {shape}, but should return N x C x H x W or N x H x W")
    if images.ndim == 4 and images.shape[3] in CHANNELS and images.shape[1] not in CHANNELS:
        advice = "`.transpose(0, 3, 1, 2)` puts the channels there"
        raise _Wrong(f"returns {part} of shape {shape}, but should return N x C x H x W; {advice}")
    return images if images.ndim == 4 else images[:, None]


def _labels(part: str, array: Any) -> NDArray[np.int64]:
    labels = _array(part, array)
    if labels.dtype.kind not in "iu":
        raise _Wrong(f"returns {part} as {labels.dtype}, but labels should be integers")
    if labels.ndim != 1:
        raise _Wrong(f"returns {part} of shape {'x'.join(map(str, labels.shape))}, but should return a label an image")
    return labels.astype(np.int64, copy=False)


def _fit_together(arrays: Mapping[str, NDArray[Any]]) -> None:
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if len(images) != len(labels):
            raise _Wrong(f"returns {len(images)} {part}_images, but {len(labels)} {part}_labels")
        if not len(labels):
            raise _Wrong(f"returns no {part}_images")
    train, test = (arrays[f"{part}_images"].shape[1:] for part in ("train", "test"))
    if train != test:
        raise _Wrong(
            f"returns train_images of {'x'.join(map(str, train))}, but test_images of {'x'.join(map(str, test))}"
        )
    labels, others = arrays["train_labels"], arrays["test_labels"]
    if min(labels.min(), others.min()) < 0:
        raise _Wrong(f"returns a label {min(labels.min(), others.min())}, but labels should count from 0")
    classes = int(labels.max()) + 1
    if classes < 2:
        raise _Wrong("returns train_labels of one class, but a study needs two or more")
    present = np.unique(labels)
    if len(present) < classes:
        absent = next(label for label, found in enumerate([*present, classes]) if label != found)
        raise _Wrong(f"returns train_labels from 0 to {classes - 1}, but no image of class {absent}")
    if others.max() >= classes:
        raise _Wrong(f"returns test_labels up to {others.max()}, but train_labels from 0 to {classes - 1}")
