"""A data set: its images and labels, what they are known again by, and how they travel to the workers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lbstudy.study.file import KeyProblems, Problem, StudyError
from lbstudy.study.run import Residency
from lbstudy.training.decoding import Track, exhaust
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


class Seen(NamedTuple):
    """What looking at all images finds, see `Dataset`."""

    sha256: NDArray[np.uint8]  # of all images and labels
    sums: NDArray[np.int64]
    digests: NDArray[np.bytes_]


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
        found = {"_seen": self._seen}  # so that no worker has to look
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
            "sha256": self._seen.sha256.tobytes().hex(),
        }

    @property
    def channel_sums(self) -> NDArray[np.int64]:
        """Of each training image and channel, the sum of its pixels and of their squares: 2 x N x C."""
        return self._seen.sums

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """What the pixels of each image are known again by; the last ones are those that test."""
        return self._seen.digests

    def look(self, track: Track | None) -> None:
        """Look at all images now, unless that was done before, and not when it is first asked what they are."""
        if "_seen" not in self.__dict__:
            self.__dict__["_seen"] = self._kept(track)

    @cached_property
    def _seen(self) -> Seen:
        return self._kept(None)

    def _kept(self, track: Track | None) -> Seen:
        """What looking at all images finds: kept beside their file, where it is one of ours."""
        place = Mapped.of(self.train_images) if self.mapped else None
        if place is None or Path(place.file).parent != decoded_folder():
            return self._look(track)
        file = Path(place.file).with_suffix(".seen.npz")
        damaged = (ValueError, KeyError, EOFError, BadZipFile)
        with suppress(OSError, *damaged), np.load(file, allow_pickle=False) as found:
            return Seen(*(found[name] for name in Seen._fields))
        seen = self._look(track)
        with suppress(OSError):  # without room for it, or the right to write it
            write(file, lambda out: np.savez(out, sha256=seen.sha256, sums=seen.sums, digests=seen.digests))
        return seen

    def _look(self, track: Track | None) -> Seen:
        """Pass over all images, once: they may be more than the memory holds."""
        whole, digests, sums = hashlib.sha256(), list[str](), list[NDArray[np.int64]]()

        def passing() -> Iterator[None]:
            train, test = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
            for trains, (images, labels) in ((True, train), (False, test)):
                whole.update(f"{images.shape}".encode())
                for rows in pieces(images):
                    whole.update(rows.data)
                    if trains:
                        sums.append(_sums(rows))
                    for image in rows:
                        digests.append(hashlib.blake2b(image.data, digest_size=16).hexdigest())
                        yield
                whole.update(np.ascontiguousarray(labels).data)

        exhaust(passing(), len(self.train_labels) + len(self.test_labels), track, "looking at the images, once")
        return Seen(np.frombuffer(whole.digest(), np.uint8), np.concatenate(sums, axis=1), np.array(digests, np.bytes_))


PIECE = 1 << 20
"""Bytes of images that are looked at together: what a core's cache holds, four times as fast as 2^24 on a CPU."""


def pieces(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The images, some at a time and contiguous, which bounds the memory that looking at them takes."""
    rows = max(1, PIECE // images[0].size)
    for start in range(0, len(images), rows):
        yield np.ascontiguousarray(images[start : start + rows])


BLOCK = 256
"""Pixels whose squares add up exactly in fp32: 256 x 255^2 < 2^24."""


def _sums(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each image and channel, the sum of its pixels and of their squares: 2 x N x C, exact."""
    samples, channels = images.shape[:2]
    pixels = images[0, 0].size
    blocks = np.zeros((samples, channels, -(-pixels // BLOCK), BLOCK), np.float32)
    blocks.reshape(samples, channels, -1)[..., :pixels] = images.reshape(samples, channels, pixels)
    sums = blocks @ np.ones(BLOCK, np.float32)
    squares = np.vecdot(blocks, blocks)
    return np.stack([part.sum(-1, dtype=np.float64) for part in (sums, squares)]).astype(np.int64)
