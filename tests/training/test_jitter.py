"""`color_jitter` against torchvision's functions, one image at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets
from lbstudy.training.data import EpochImages, place
from lbstudy.training.jitter import Jitter, jittered

THEIRS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
CPU = torch.device("cpu")


def drawn(count: int, strength: float = 0.6) -> Jitter:
    return Jitter.draw(np.random.default_rng(0), count, strength, CPU)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_changed_as_by_torchvision(channels: int):
    images = torch.randint(0, 256, (50, channels, 9, 7), dtype=torch.uint8, generator=torch.manual_seed(0))
    jitter = drawn(50)
    found = jittered(images, jitter, torch.float64)
    for image, operations, factors, result in zip(images, *jitter, found, strict=True):
        wanted: Tensor = image.double() / 255
        for operation, factor in zip(operations.tolist(), factors.tolist(), strict=True):
            wanted = THEIRS[operation](wanted, factor)
        torch.testing.assert_close(result, wanted * 255, atol=1e-6, rtol=0)
    assert (found == 0).any()  # it has been cut off somewhere
    assert (found == 255).any()


def test_orders_and_factors_are_uniform():
    jitter = drawn(6000, 0.4)
    orders, counts = np.unique(jitter.operations.numpy(), axis=0, return_counts=True)
    assert len(orders) == 6
    assert (np.abs(counts - 1000) < 150).all()
    factors = jitter.factors.numpy()
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.02)


def test_it_follows_seed_and_epoch_alone():
    spec = DatasetSpec(name="synthetic", samples=120, validation_size=20, augment=("color_jitter", "flip"))
    data = place(datasets.load(spec), spec, 0)
    everything = torch.arange(len(data.train))
    first, second = (EpochImages(data, spec, 1, epoch, torch.float64) for epoch in (1, 2))
    whole = first.images(everything)
    assert torch.equal(whole, torch.cat([first.images(part) for part in everything.split(13)]))
    assert not torch.equal(whole, second.images(everything))
    weak = spec.model_copy(update={"jitter": 1e-9})
    plain = spec.model_copy(update={"augment": ("flip",)})
    faint, none = (EpochImages(data, other, 1, 1, torch.float64).images(everything) for other in (weak, plain))
    assert not torch.equal(whole, none)
    torch.testing.assert_close(faint, none, atol=1e-6, rtol=0)
