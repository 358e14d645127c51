"""CutMix against a slow reference, sample by sample, and against the expected area."""

import math
from zlib import crc32

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

from lbstudy.methods import smoothing
from lbstudy.methods.declaration import MethodError
from lbstudy.methods.smoothing import Combined, Part
from lbstudy.methods.smoothing.cutmix import CutMix, Numbers, box
from lbstudy.study.run import Spec

CPU = torch.device("cpu")


def cutmix(alpha: float = 1.0, seed: int = 7) -> CutMix:
    return CutMix(nn.Linear(1, 1), Numbers(cutmix_alpha=alpha), Spec(), seed=seed)


def fetch(chosen: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 3 x 8 x 12 whose every value is its sample's position, and labels."""
    positions = torch.arange(20)[chosen]
    images = positions.double().view(-1, 1, 1, 1).expand(-1, 3, 8, 12)
    return images, positions % 10


def part(step: int, positions: slice, size: int = 20) -> Part:
    return Part(step, size, positions, fetch, CPU, torch.float64)


def reference(
    images: np.ndarray, labels: np.ndarray, partners: np.ndarray, kept: float, row: int, column: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel by pixel: images, and soft labels by the pixels counted."""
    samples, _, height, width = images.shape
    mixed, soft = images.copy(), np.zeros((samples, 10))
    half_rows, half_columns = (int(side * math.sqrt(1 - kept)) // 2 for side in (height, width))
    for n in range(samples):
        pasted = 0
        for y in range(height):
            for x in range(width):
                if -half_rows <= y - row < half_rows and -half_columns <= x - column < half_columns:
                    mixed[n, :, y, x] = images[partners[n], :, y, x]
                    pasted += 1
        soft[n, labels[n]] += 1 - pasted / (height * width)
        soft[n, labels[partners[n]]] += pasted / (height * width)
    return mixed, soft


def test_inputs_and_loss_are_those_of_a_slow_reference():
    method = cutmix()
    areas = set()
    for step in range(30):
        seed = np.random.default_rng([7, crc32(b"cutmix"), step])
        kept, row, column, partners = seed.beta(1, 1), seed.integers(8), seed.integers(12), seed.permutation(20)
        images, labels = fetch(torch.arange(20))
        mixed, soft = reference(images.numpy(), labels.numpy(), partners, kept, row, column)
        inputs = method.inputs(part(step, slice(0, 20)))
        np.testing.assert_array_equal(inputs.images.numpy(), mixed)
        logits = torch.randn(20, 10, dtype=torch.float64)
        loss = Combined([method]).loss_sum(logits, inputs)
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.from_numpy(soft), reduction="sum"))
        areas.add(method.draw(step, 20, 8, 12, CPU).box.area)
    assert len(areas) > 10


def test_a_part_has_its_share_of_the_mini_batch():
    method = cutmix()
    whole = method.inputs(part(4, slice(0, 20)))
    for positions in (slice(0, 7), slice(7, 20), slice(20, 20)):
        mine = cutmix().inputs(part(4, positions))
        for found, all_of_it in zip(mine, whole, strict=True):
            assert torch.equal(found, all_of_it[positions])


def test_images_of_the_data_are_left_alone():
    images, labels = torch.rand(20, 3, 8, 12), torch.arange(20) % 10
    before = images.clone()
    method = cutmix()
    for step in range(5):
        method.inputs(Part(step, 20, slice(0, 20), lambda positions: (images, labels), CPU, torch.float32))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("kept", "area"), [(1.0, 0), (0.0, 16 * 16), (0.75, 8 * 8), (0.9, 4 * 4)])
def test_box_in_the_middle_has_the_area_that_was_drawn(kept: float, area: int):
    """sqrt(1 - 0.9) of 16 is 5.06: in whole pixels on both sides of the centre, 2 + 2."""
    assert box(kept, 8, 8, 16, 16).area == area


def test_box_is_clipped():
    assert box(0.75, 0, 15, 16, 16) == (slice(0, 4), slice(11, 16))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_pasted_share_has_the_expected_mean(alpha: float):
    """In a large image, where whole pixels do not matter: a side r of the image's, clipped around a uniform centre,
    leaves r - r^2 / 4 on average, so that the mean share is E[(r - r^2 / 4)^2], r = sqrt(1 - lambda)."""
    method, size = cutmix(alpha), 1000
    shares = np.array([method.draw(step, 1, size, size, CPU).box.area for step in range(6000)]) / size**2
    density = stats.beta(alpha, alpha).pdf
    expected = integrate.quad(lambda kept: density(kept) * (math.sqrt(1 - kept) - (1 - kept) / 4) ** 2, 0, 1)[0]
    assert abs(shares.mean() - expected) < 4 * shares.std() / math.sqrt(len(shares)) + 1 / size
    assert abs(shares.mean() - 0.5) > 0.1  # and not that of lambda


def test_mixup_and_cutmix_are_refused_together():
    with pytest.raises(MethodError, match="^mixup and cutmix cannot be combined: each mixes or changes the inputs$"):
        smoothing.parts_of("mixup+cutmix")
