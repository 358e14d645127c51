"""Images on the training device: split, order, augmentation and slices of the global mini-batch.

The whole set stays on the device as uint8. An epoch's order and augmentation are functions of (seed, epoch), and
each worker asks for its own positions of the *global* mini-batch: what is learnt does not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbstudy.parallel.randomness import stream
from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec, TrainOn
from lbstudy.training.datasets import Dataset, validation_samples

PAD = 4
CUTOUT = 16


@dataclass(frozen=True)
class Images:
    """Images (uint8, N x C x H x W) and labels (int64, N) on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A dataset on a device: training and validation split, test set, and the training images' mean and deviation."""

    train: Images
    validation: Images
    test: Images
    classes: int
    mean: Tensor  # C, in units of a pixel (0 to 255), float64
    std: Tensor
    _augmentable: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)
    _normalising: dict[torch.dtype, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def augmentable(self, augment: tuple[str, ...]) -> Tensor:
        """The training images as these augmentations want them, made once: padded for cropping, and followed by their
        mirror images for flipping."""
        if augment not in self._augmentable:
            images = self.train.images
            if "crop" in augment:
                images = torch.nn.functional.pad(images, (PAD, PAD, PAD, PAD))
            self._augmentable[augment] = torch.cat([images, images.flip(-1)]) if "flip" in augment else images
        return self._augmentable[augment]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    def normalise(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images with zero mean and unit deviation per channel, over the training split."""
        if dtype not in self._normalising:
            numbers = (1 / self.std, -self.mean / self.std)
            self._normalising[dtype] = tuple(number.to(dtype).view(-1, 1, 1) for number in numbers)
        scale, shift = self._normalising[dtype]
        return images.to(dtype).mul_(scale).add_(shift)


def place(
    dataset: Dataset,
    spec: DatasetSpec,
    split_seed: int,
    device: torch.device | str = "cpu",
    train_on: TrainOn = "split",
) -> ImageData:
    """Split the training set (stratified, by seed) and put everything on the device. With `train_on` "all" the samples
    that validate are trained on too.

    Raises:
        StudyError: the split is impossible.
    """
    count = validation_samples(spec, len(dataset.train_labels))
    if count < dataset.classes or len(dataset.train_labels) - count < dataset.classes:
        raise StudyError(
            f"dataset.validation_size: {count} of {len(dataset.train_labels)} training samples; a stratified split "
            f"needs at least one of each of the {dataset.classes} classes on both sides"
        )
    validates = stratified_choice(dataset.train_labels, count, stream(split_seed, "split"))
    train, validation = np.flatnonzero(~validates | (train_on == "all")), np.flatnonzero(validates)
    pixels = dataset.train_images[train].transpose(1, 0, 2, 3).reshape(dataset.train_images.shape[1], -1)
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels])  # integers: exact and repeatable
    mean = counts @ np.arange(256) / pixels.shape[1]
    std = np.sqrt(counts @ np.arange(256) ** 2 / pixels.shape[1] - mean**2)

    def put(images: np.ndarray, labels: np.ndarray) -> Images:
        return Images(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    return ImageData(
        train=put(dataset.train_images[train], dataset.train_labels[train]),
        validation=put(dataset.train_images[validation], dataset.train_labels[validation]),
        test=put(dataset.test_images, dataset.test_labels),
        classes=dataset.classes,
        mean=torch.from_numpy(mean).to(device),
        std=torch.from_numpy(np.maximum(std, 1e-6)).to(device),
    )


def stratified_choice(labels: NDArray[np.int64], count: int, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Choose `count` samples at random, each class in its share (rounded by largest remainder). Returns a mask."""
    sizes = np.bincount(labels)
    shares = sizes * (count / len(labels))
    quotas = np.floor(shares).astype(int)
    quotas[np.argsort(quotas - shares, kind="stable")[: count - quotas.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for label, quota in enumerate(quotas):
        chosen[draw.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return chosen


def worker_slice(samples: int, rank: int, workers: int, unit: int = 1) -> slice:
    """The positions of a mini-batch of `samples` that a worker takes: contiguous, cut only at multiples of `unit`.

    Slices differ by at most one unit; a worker's slice is empty where there are fewer units than workers.
    """
    units = -(-samples // unit)
    return slice(min(samples, units * rank // workers * unit), min(samples, units * (rank + 1) // workers * unit))


class EpochImages:
    """One epoch's training images in their order, each augmented in its own way.

    Order, crop, flip and cutout of every position are drawn at once, as functions of (seed, epoch).
    """

    def __init__(self, data: ImageData, spec: DatasetSpec, seed: int, epoch: int, dtype: torch.dtype):
        device, count = data.train.images.device, len(data.train)
        self._before = partial(EpochImages, data, spec, seed, epoch - 1, dtype) if epoch > 1 else None
        self._data, self.dtype, self._source = data, dtype, data.augmentable(spec.augment)
        self.order = torch.from_numpy(stream(seed, "order", epoch).permutation(count)).to(device)
        draw = stream(seed, "augmentation", epoch)
        height, width = data.shape[1:]

        def integers(high: int) -> Tensor:
            return torch.from_numpy(draw.integers(high, size=count)).to(device)

        self._crop = (integers(2 * PAD + 1), integers(2 * PAD + 1)) if "crop" in spec.augment else None
        self._flip = integers(2) if "flip" in spec.augment else None
        self._cutout = (integers(height), integers(width)) if "cutout" in spec.augment else None

    def of_epoch_before(self) -> EpochImages | None:
        """Those of the epoch before, if there was one."""
        return self._before() if self._before else None

    def labels(self, positions: Tensor) -> Tensor:
        """Labels of these positions of the epoch."""
        return self._data.train.labels[self.order[positions]]

    def images(self, positions: Tensor) -> Tensor:
        """Augmented, normalised images of these positions of the epoch."""
        index = self.order[positions]
        if self._flip is not None:
            index = index + len(self.order) * self._flip[positions]
        if self._crop is not None:
            tops, lefts = (offsets[positions] for offsets in self._crop)
            images = crop(self._source, index, tops, lefts)
        else:
            images = self._source[index]
        images = self._data.normalise(images, self.dtype)
        if self._cutout is not None:
            images = cutout(images, self._cutout[0][positions], self._cutout[1][positions])
        return images


def crop(padded: Tensor, index: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """Cut each of the indexed images to its size without padding, at its own offset (0 to 2 PAD)."""
    height, width = (size - 2 * PAD for size in padded.shape[2:])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: N, C, 2 PAD + 1, 2 PAD + 1, H, W
    return windows[index, :, tops, lefts]


def cutout(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Set to zero, the mean, a CUTOUT-pixel square around each image's own centre (DeVries & Taylor 2017)."""
    height, width = images.shape[2:]
    far_rows = (torch.arange(height, device=images.device) - rows[:, None] + CUTOUT // 2) // CUTOUT != 0
    far_columns = (torch.arange(width, device=images.device) - columns[:, None] + CUTOUT // 2) // CUTOUT != 0
    return images * (far_rows[:, None, :, None] | far_columns[:, None, None, :])
