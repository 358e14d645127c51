"""A data set: its images and labels, what they are known again by, and how they travel to the workers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbstudy.study.file import KeyProblems, Problem, StudyError
from lbstudy.study.run import Residency
from lbstudy.training.mapped import Mapped, open_mapped, write, write_array
from lbstudy.training.residency import on_machine
from lbstudy.training.trees import Origin


def cache_folder() -> Path:
    """Where data are looked for by default, and decoded trees kept: in the user's cache folder; for a user who has no
    home, as in some containers, among the temporary files."""
    try:
        return Path.home() / ".cache" / "lbstudy"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lbstudy"


def decoded_folder() -> Path:
    """Where decoded images are kept."""
    return cache_folder() / "decoded"


@dataclass(frozen=True)
class Dataset:
    """Images as uint8, N x C x H x W, and labels as int64, N; for training and for testing."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int
    origin: Origin = field(default_factory=Origin)  # of an image tree
    mapped: bool = False  # whether it travels as the place of its files, which must be there where it arrives

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return self.train_images.nbytes + self.test_images.nbytes

    def __getstate__(self) -> dict[str, Any]:
        images = ("train_images", "test_images") if self.mapped else ()
        found = {"channel_sums": self.channel_sums}  # so that no worker has to count
        return self.__dict__ | found | {name: Mapped.of(getattr(self, name)) for name in images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, Mapped):
                try:
                    value = value.open()
                except (OSError, ValueError) as error:
                    raise StudyError(
                        f"dataset.residency: the images are not held in memory, but their file {value.file} is not on "
                        f"{os.uname().nodename}; all nodes must see it, at the same path ({error})"
                    ) from error
            self.__dict__[name] = value

    def settled(self, wanted: Residency) -> Dataset:
        """The same data, in memory or in a mapped file, see `residency`.

        Raises:
            StudyError: they are to be in a file, but none can be written.
        """
        if on_machine(wanted, self.nbytes) == "device":
            return self
        if Mapped.of(self.train_images) and Mapped.of(self.test_images):
            return replace(self, mapped=True)
        file = decoded_folder() / f"{self.identity['sha256'][:24]}.npy"
        parts, count = (self.train_images, self.test_images), len(self.train_images)
        try:
            if not file.is_file():
                shape = (count + len(self.test_images), *self.train_images.shape[1:])
                write_array(file, shape, chain.from_iterable(map(pieces, parts)))
            images = open_mapped(file)
        except (OSError, ValueError) as error:
            reason = f"the images take {self.nbytes / 1e9:.3g} GB and are to be mapped, but {file} cannot be: {error}"
            raise KeyProblems(Problem(("dataset", "residency"), reason)) from error
        return replace(self, train_images=images[:count], test_images=images[count:], mapped=True)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What it is known again by (JSON): a SHA-256 of all images and labels, and what a person can compare."""
        return {
            "training images": len(self.train_labels),
            "test images": len(self.test_labels),
            "shape": list(self.train_images.shape[1:]),
            "classes": self.classes,
            "sha256": self.kept("sha256", self._sha256).tobytes().hex(),
        }

    def _sha256(self) -> NDArray[np.uint8]:
        digest = hashlib.sha256()
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            digest.update(f"{images.shape}".encode())
            for rows in pieces(images):
                digest.update(rows.data)
            digest.update(np.ascontiguousarray(labels).data)
        return np.frombuffer(digest.digest(), np.uint8)

    @cached_property
    def channel_sums(self) -> NDArray[np.int64]:
        """Of each training image and channel, the sum of its pixels and of their squares: 2 x N x C."""
        return self.kept("sums", self._channel_sums)

    def _channel_sums(self) -> NDArray[np.int64]:
        squares = np.arange(256, dtype=np.uint16) ** 2
        found = [
            [plane.sum(-1, dtype=np.int64), squares[plane].sum(-1, dtype=np.int64)]
            for plane in (rows.reshape(*rows.shape[:2], -1) for rows in pieces(self.train_images))
        ]
        return np.concatenate(found, axis=1)

    def kept(self, name: str, find: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What takes a pass over all images to find out: kept beside their file, where it is one of ours."""
        place = Mapped.of(self.train_images) if self.mapped else None
        if place is None or Path(place.file).parent != decoded_folder():
            return find()
        file = Path(place.file).with_suffix(f".{name}.npy")
        with suppress(OSError, ValueError):  # not there, or damaged
            return np.load(file, allow_pickle=False)
        found = find()
        with suppress(OSError):  # without room for it, or the right to write it
            write(file, lambda out: np.save(out, found))
        return found


PIECE = 1 << 24
"""Bytes of images that are looked at together."""


def pieces(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The images, some at a time and contiguous, which bounds the memory that looking at them takes."""
    rows = max(1, PIECE // images[0].size)
    for start in range(0, len(images), rows):
        yield np.ascontiguousarray(images[start : start + rows])
