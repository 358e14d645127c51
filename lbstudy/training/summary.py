"""What a dataset is, in sentences for a person who is about to train on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lbstudy.training.dataset import Dataset


@dataclass(frozen=True)
class Summary:
    """A dataset, described from its pixels and labels."""

    train: int  # images
    test: int
    shape: tuple[int, ...]  # C x H x W
    per_class: tuple[int, ...]  # training images of each
    mean: tuple[float, ...]  # of the training images, a channel each, pixels from 0 to 1
    deviation: tuple[float, ...]
    in_both: int  # test images that are, pixel by pixel, training images too
    repeated: int  # training images that are, pixel by pixel, an earlier training image again
    modes: tuple[str, ...] = ()  # of an image tree: as stored
    left_out: tuple[str, ...] = ()  # of an image tree: files that are not used, by kind

    def sentences(self) -> Iterator[str]:
        """What a person should see before training on it."""
        few, many = min(self.per_class), max(self.per_class)
        balance = f"{few:,} each" if few == many else f"from {few:,} to {many:,}"
        stored = f", stored as {', '.join(self.modes)}" if self.modes else ""
        yield (
            f"{self.train:,} training and {self.test:,} test images of {'x'.join(map(str, self.shape))}{stored}; "
            f"{len(self.per_class)} classes, {balance} to train; "
            f"mean {_numbers(self.mean)}, deviation {_numbers(self.deviation)}"
        )
        if self.left_out:
            yield f"not used: {'; '.join(self.left_out)}"
        share = (
            f"{self.in_both:,} of {self.test:,} test images ({self.in_both / self.test:.1%}) are training images too"
        )
        yield f"{share}, pixel by pixel" if self.in_both else "no test image is a training image too"
        if self.repeated:
            yield f"{self.repeated:,} of {self.train:,} training images repeat another one, pixel by pixel"


def summarise(dataset: Dataset) -> Summary:
    """Describe a dataset."""
    digests = dataset.digests.tolist()
    train, test = digests[: len(dataset.train_labels)], digests[len(dataset.train_labels) :]
    known = set(train)
    mean, squares = dataset.channel_sums.sum(1) / dataset.train_images[:, 0].size / [[255], [255**2]]
    deviation = np.sqrt(np.maximum(squares - mean**2, 0))
    origin = dataset.origin
    several = len(origin.modes) > 1
    return Summary(
        train=len(train),
        test=len(test),
        shape=dataset.train_images.shape[1:],
        per_class=tuple(np.bincount(dataset.train_labels, minlength=dataset.classes).tolist()),
        mean=tuple(mean.tolist()),
        deviation=tuple(deviation.tolist()),
        in_both=sum(one in known for one in test),
        repeated=len(train) - len(known),
        modes=tuple(f"{mode} ({count:,})" if several else mode for mode, count in sorted(origin.modes.items())),
        left_out=tuple(
            f"{out.files:,} {kind if kind.startswith('.') else f'files {kind}'} (first: {out.first})"
            for kind, out in origin.left_out.items()
        ),
    )


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in values) + ")"
