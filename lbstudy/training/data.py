"""Images for the training device: split, order, augmentation and slices of the global mini-batch.

Images are uint8, on the device or in the host's memory (`residency`), and no worker holds a copy of what it shares
with others: split, order, crop and flip are indices. An epoch's order and augmentation are functions of (seed, epoch),
and each worker asks for its own positions of the *global* mini-batch: what is learnt does not depend on how many there
are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbstudy.parallel.randomness import stream
from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec, TrainOn
from lbstudy.training.dataset import Dataset
from lbstudy.training.datasets import validation_samples
from lbstudy.training.jitter import Jitter, jittered
from lbstudy.training.residency import on_device
from lbstudy.training.resized import random_boxes, resized
from lbstudy.training.staging import gather, one_ahead, room

PAD = 4
CUTOUT = 16


@dataclass(frozen=True)
class Images:
    """Images (uint8) and their labels, for work on the device of the labels."""

    pixels: Tensor  # M x C x H x W: on the device, or in the host's memory
    labels: Tensor  # int64, N
    rows: Tensor | None = None  # int64, N, beside the pixels: which of these it is about; None: all

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where they are worked with."""
        return self.labels.device

    @property
    def afar(self) -> bool:
        """Whether their pixels are not on the device."""
        return self.pixels.device != self.device

    def at(self, positions: Tensor | slice) -> Tensor:
        """The images at these positions, on the device: uint8, k x C x H x W."""
        if self.rows is not None:
            positions = self.rows[positions.to(self.rows.device) if isinstance(positions, Tensor) else positions]
        elif isinstance(positions, slice) and not self.afar:
            return self.pixels[positions]
        elif isinstance(positions, slice):
            positions = torch.arange(len(self))[positions]
        return gather(self.pixels, positions.to(self.pixels.device), self.device)

    def one_ahead(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        """The images at one part's positions after another's, the next ones on their way; positions are in the host's
        memory, as are the pixels."""
        return one_ahead(self.pixels, (part if self.rows is None else self.rows[part] for part in parts), self.device)


@dataclass(frozen=True)
class ImageData:
    """A dataset for a device: training and validation split, test set, and the training images' mean and deviation."""

    train: Images
    validation: Images
    test: Images
    classes: int
    mean: Tensor  # C, in units of a pixel (0 to 255), float64
    std: Tensor
    crop_size: int | None = None  # what a network gets of an image: so many pixels square; None: all
    gpu_share: float = 1.0  # of the device's memory that belongs to whoever trains with these
    _normalising: dict[torch.dtype, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where it is trained on."""
        return self.train.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a network gets."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, self.crop_size or height, self.crop_size or width

    def plain(
        self, images: Images, positions: Tensor | slice, dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:  # fmt: skip
        """Images at these positions as they are evaluated: not augmented, but for the centre; normalised."""
        return self.normalise(centre(images.at(positions), self.shape[1:]), dtype, layout)

    def normalise(
        self, images: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Images with zero mean and unit deviation per channel, over the training split.

        To put the channels last as bytes and then compute with whole rows of pixels takes a CPU a quarter of the time
        that it takes to do so with the normalised images.
        """
        if dtype not in self._normalising:
            numbers = (1 / self.std, -self.mean / self.std)
            self._normalising[dtype] = tuple(number.to(dtype).view(-1, 1, 1) for number in numbers)
        scale, shift = self._normalising[dtype]
        if layout is torch.contiguous_format:
            return images.to(dtype).mul_(scale).add_(shift)
        width = images.shape[-1]
        rows = torch.stack(images.unbind(1), -1).flatten(2).to(dtype)
        rows.mul_(scale.flatten().repeat(width)).add_(shift.flatten().repeat(width))
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)


def place(
    dataset: Dataset,
    spec: DatasetSpec,
    split_seed: int,
    device: torch.device | str = "cpu",
    train_on: TrainOn = "split",
    share: float = 1.0,
) -> ImageData:
    """Split the training set (stratified, by seed) for training on a device, and put the images where they lie from now
    on.

    Args:
        dataset: the images.
        spec: how many validate, and where the images lie.
        split_seed: of the split.
        device: to train on.
        train_on: "all": the samples that validate are trained on too.
        share: of a GPU that is this worker's.

    Raises:
        StudyError: the split is impossible.
    """
    count = validation_samples(spec, len(dataset.train_labels))
    if count < dataset.classes or len(dataset.train_labels) - count < dataset.classes:
        raise StudyError(
            f"dataset.validation_size: {count} of {len(dataset.train_labels)} training samples; a stratified split "
            f"needs at least one of each of the {dataset.classes} classes on both sides"
        )
    device = torch.device(device)
    validates = stratified_choice(dataset.train_labels, count, stream(split_seed, "split"))
    validation = np.flatnonzero(validates)
    train = np.arange(len(validates)) if train_on == "all" else np.flatnonzero(~validates)
    pixels = len(train) * dataset.train_images[0, 0].size
    mean, squares = dataset.channel_sums[:, train].sum(1) / pixels  # of integers: exact and repeatable
    std = np.sqrt(squares - mean**2)
    where = torch.device("cpu")
    if device.type == "cuda" and on_device(spec.residency, dataset.nbytes, room(device, share)) == "device":
        where = device
    images, tests = (_tensor(part).to(where) for part in (dataset.train_images, dataset.test_images))

    def split(rows: NDArray[np.int64]) -> Images:
        labels = torch.from_numpy(dataset.train_labels[rows]).to(device)
        return Images(images, labels, torch.from_numpy(rows).to(where))

    return ImageData(
        train=split(train),
        validation=split(validation),
        test=Images(tests, torch.tensor(dataset.test_labels, device=device)),
        classes=dataset.classes,
        mean=torch.from_numpy(mean).to(device),
        std=torch.from_numpy(np.maximum(std, 1e-6)).to(device),
        crop_size=spec.crop_size,
        gpu_share=share,
    )


def _tensor(array: NDArray[np.uint8]) -> Tensor:
    """The same memory as a tensor, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


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

    Order, boxes, crop, flip, colours and cutout of every position are drawn at once, as functions of (seed, epoch).
    """

    def __init__(
        self, data: ImageData, spec: DatasetSpec, seed: int, epoch: int, dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
    ):  # fmt: skip
        device, count = data.device, len(data.train)
        self._before = partial(EpochImages, data, spec, seed, epoch - 1, dtype, layout) if epoch > 1 else None
        self._data, self.dtype, self._layout = data, dtype, layout
        self._staged: tuple[slice, Tensor] | None = None  # positions whose images are on the device, and these
        self._order = torch.from_numpy(stream(seed, "order", epoch).permutation(count))
        self.order = self._order.to(device)
        draw = stream(seed, "augmentation", epoch)
        height, width = data.shape[1:]

        def integers(high: int) -> Tensor:
            return torch.from_numpy(draw.integers(high, size=count)).to(device)

        self._boxes = None
        if "random_resized_crop" in spec.augment:
            self._boxes = torch.from_numpy(random_boxes(draw, count, *data.train.pixels.shape[2:])).to(device)
        self._crop = (integers(2 * PAD + 1), integers(2 * PAD + 1)) if "crop" in spec.augment else None
        self._flip = integers(2) if "flip" in spec.augment else None
        self._cutout = (integers(height), integers(width)) if "cutout" in spec.augment else None
        self._jitter = Jitter.draw(draw, count, spec.jitter, device) if "color_jitter" in spec.augment else None

    def of_epoch_before(self) -> EpochImages | None:
        """Those of the epoch before, if there was one."""
        return self._before() if self._before else None

    def in_turn(self, starts: Sequence[int], share: Callable[[int], slice]) -> Iterator[int]:
        """Where each mini-batch begins, in order. Images that lie in the host's memory are on the device when it is
        their mini-batch's turn, and those of the next one on their way.

        Args:
            starts: of the mini-batches.
            share: the positions in the epoch that this worker takes of the mini-batch with this start.
        """
        if not self._data.train.afar:
            yield from starts
            return
        shares = [share(start) for start in starts]
        coming = self._data.train.one_ahead(self._order[part] for part in shares)
        for start, part, images in zip(starts, shares, coming, strict=True):
            self._staged = part, images
            yield start
        self._staged = None

    def labels(self, positions: Tensor) -> Tensor:
        """Labels of these positions of the epoch."""
        return self._data.train.labels[self.order[positions]]

    def images(self, positions: Tensor, among: slice | None = None) -> Tensor:
        """Augmented, normalised images of these positions of the epoch.

        Args:
            positions: k, on the device.
            among: where they are, as far as it is known without looking at them.
        """
        images = self._pixels(positions, among)
        if self._flip is not None:
            images = flip(images, self._flip[positions])
        if self._boxes is not None:
            images = resized(images, self._boxes[positions], self._data.shape[1:], self.dtype)
        else:
            images = centre(images, self._data.shape[1:])
        if self._crop is not None:
            images = crop(images, *(offsets[positions] for offsets in self._crop))
        if self._jitter is not None:
            images = jittered(images, self._jitter.at(positions), self.dtype)
        images = self._data.normalise(images, self.dtype, self._layout)
        if self._cutout is not None:
            images = cutout(images, self._cutout[0][positions], self._cutout[1][positions])
        return images

    def _pixels(self, positions: Tensor, among: slice | None) -> Tensor:
        if self._staged is not None and among is not None:
            there, images = self._staged
            if there.start <= among.start and among.stop <= there.stop:
                return images.index_select(0, positions - there.start)
        return self._data.train.at(self.order[positions])


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images, k x C x H x W, whose entry of `mirrored` (k) is 1 and not 0."""
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * mirrored)


def crop(images: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """Cut each image to its size out of itself, padded by PAD zeros on each side, at its own offset (0 to 2 PAD).

    A row of the result lies in one piece among the padded images, and is found by where it begins: on a CPU that takes
    a fifth of the time of an index of image, top and left.
    """
    count, channels, height, width = images.shape
    if not count:  # of a worker without samples
        return images
    padded = torch.nn.functional.pad(images, (PAD, PAD, PAD, PAD))
    tall, wide = padded.shape[2:]
    planes = torch.arange(count * channels, device=images.device).view(count, channels, 1) * tall
    rows = planes + tops.view(-1, 1, 1) + torch.arange(height, device=images.device)
    begins = rows * wide + lefts.view(-1, 1, 1)
    return padded.view(-1).unfold(0, width, 1).index_select(0, begins.view(-1)).view(images.shape)


def centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the images, height x width."""
    top, left = ((there - wanted) // 2 for there, wanted in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


def cutout(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Set to zero, the mean, a CUTOUT-pixel square around each image's own centre (DeVries & Taylor 2017)."""
    height, width = images.shape[2:]
    far_rows = (torch.arange(height, device=images.device) - rows[:, None] + CUTOUT // 2) // CUTOUT != 0
    far_columns = (torch.arange(width, device=images.device) - columns[:, None] + CUTOUT // 2) // CUTOUT != 0
    return images * (far_rows[:, None, :, None] | far_columns[:, None, None, :])
