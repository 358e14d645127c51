"""`random_resized_crop` against torchvision's rules and torch's interpolation, and what a network then gets."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

from lbstudy.study.run import Budget, DatasetSpec, ModelSpec, RunSpec
from lbstudy.training import datasets
from lbstudy.training.data import EpochImages, place
from lbstudy.training.resized import random_boxes, resized
from lbstudy.training.train import train

SPEC = DatasetSpec(name="synthetic", samples=120, validation_size=20, augment=("random_resized_crop",), crop_size=28)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90), (300, 20)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int):
    boxes = random_boxes(np.random.default_rng(0), 4000, height, width)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    error = np.sqrt((boxes.var(0) + theirs.var(0)) / 4000) + 1e-12
    assert (np.abs(boxes.mean(0) - theirs.mean(0)) < 5 * error).all()
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(
            *(np.quantile(b, quantile, axis=0) for b in (boxes, theirs)), atol=0.06 * max(height, width)
        )


@pytest.mark.parametrize("size", [(16, 16), (9, 21), (50, 40)])
def test_parts_are_interpolated_as_torch_does(size: tuple[int, int]):
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (40, 3, 24, 32), dtype=np.uint8))
    boxes = random_boxes(draw, 40, 24, 32)
    found = resized(images, torch.from_numpy(boxes), size, torch.float64)
    for image, (top, left, height, width), result in zip(images, boxes, found, strict=True):
        part = image[None, :, top : top + height, left : left + width].double()
        wanted = F.interpolate(part, size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result, wanted, atol=1e-9, rtol=0)


def test_evaluation_takes_the_centre():
    dataset = datasets.load(SPEC)
    data = place(dataset, SPEC, 0)
    assert data.shape == datasets.input_shape(SPEC, dataset) == (3, 28, 28)
    middle = torch.from_numpy(dataset.test_images[:5, :, 2:30, 2:30])
    torch.testing.assert_close(data.plain(data.test, slice(5), torch.float64), data.normalise(middle, torch.float64))


def test_each_image_is_cut_by_seed_and_epoch_alone():
    data = place(datasets.load(SPEC), SPEC, 0)
    everything = torch.arange(len(data.train))
    first, second = (EpochImages(data, SPEC, 1, epoch, torch.float32) for epoch in (1, 2))
    whole = first.images(everything)
    assert whole.shape == (100, 3, 28, 28)
    assert torch.equal(whole, torch.cat([first.images(part) for part in everything.split(13)]))
    assert not torch.equal(whole, second.images(everything))
    plain = EpochImages(data, SPEC.model_copy(update={"augment": ()}), 1, 1, torch.float32).images(everything)
    assert plain.shape == whole.shape


def test_micro_batches_change_rounding_only():
    run = RunSpec(
        model=ModelSpec(name="lenet5"), dataset=SPEC.model_copy(update={"augment": ("random_resized_crop", "flip")}),
        batch_size=40, optimizer="sgd", hyper={"learning_rate": 0.05}, precision="fp64", budget=Budget(epochs=2),
        evaluate="all",
    )  # fmt: skip
    data = place(datasets.load(SPEC), SPEC, 0)
    losses = [
        [getattr(last, f"{part}_loss") for part in ("train", "val", "test", "clean_train")]
        for last in (train(run.model_copy(update={"micro_batch_size": size}), data).last for size in (None, 7))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-9)


def test_two_kinds_of_crop_are_refused():
    with pytest.raises(ValidationError, match="one of `crop` and `random_resized_crop`"):
        DatasetSpec(name="digits", augment=("crop", "random_resized_crop"))
