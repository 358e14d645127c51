"""How images and weights lie in memory: as is fastest, and never so that it changes what is computed."""

import pytest
import torch
from torch import nn

from lbstudy.analysis.minima import landscape
from lbstudy.analysis.minima.directions import DirectionSpec
from lbstudy.methods import models
from lbstudy.methods.smoothing import Part
from lbstudy.study.run import DatasetSpec
from lbstudy.training.data import EpochImages, place
from lbstudy.training.datasets import load
from lbstudy.training.loop import format_of, placed
from lbstudy.training.train import train
from tests.training.test_train import digits, make_run

CPU, LAST = torch.device("cpu"), torch.channels_last


@pytest.mark.parametrize("augment", [(), ("crop", "flip", "cutout"), ("random_resized_crop", "color_jitter")])
def test_images_are_the_same_with_the_channels_last(augment: tuple[str, ...]):
    dataset = DatasetSpec(name="synthetic", samples=100, validation_size=20, augment=augment)
    data = place(load(dataset), dataset, 0)
    some = torch.arange(70)
    usual, last = (
        EpochImages(data, dataset, 1, 1, torch.float32, layout).images(some)
        for layout in (torch.contiguous_format, LAST)
    )
    assert last.is_contiguous(memory_format=LAST)
    assert not last.is_contiguous()
    assert torch.equal(usual, last)
    plain = data.plain(data.test, slice(5), torch.float32, LAST)
    assert plain.is_contiguous(memory_format=LAST)
    assert torch.equal(plain, data.plain(data.test, slice(5), torch.float32))


def test_partners_lie_in_memory_as_the_samples_do():
    images, labels = torch.rand(6, 3, 4, 5), torch.arange(6)
    partners = torch.tensor([3, 0, 1, 5, 4, 2])
    for layout in (torch.contiguous_format, LAST):
        pixels = images.contiguous(memory_format=layout)
        part = Part(
            0, 6, slice(0, 6), lambda chosen, pixels=pixels: (pixels[chosen], labels[chosen]), CPU, images.dtype
        )
        found = part.partners(part.own(), partners)
        assert found.images.is_contiguous(memory_format=layout)
        assert torch.equal(found.images, images[partners])
        assert found.labels.tolist() == partners.tolist()


def test_convolutions_have_the_channels_last_where_that_is_fastest():
    for precision, layout in (("fp32", LAST), ("bf16", LAST), ("fp64", torch.contiguous_format)):
        model = placed(models.build("lenet5", (3, 32, 32), 10), (3, 32, 32), CPU, precision)
        assert format_of(model) is layout


def test_a_network_that_takes_views_trains_and_is_looked_at():
    dataset, data = digits(128)
    run = make_run(dataset, model="tests.networks:Viewing", budget={"epochs": 2})
    model = models.build(run.model.name, data.shape, data.classes)
    assert format_of(placed(model, data.shape, CPU, "fp32")) is torch.contiguous_format
    first: list[float] = []
    outcome = train(run, data, on_epoch=lambda report, _: first.append(report.val_loss) or False)
    assert outcome.last.val_loss < first[0]
    points = landscape.line(outcome.model, DirectionSpec(), directions=1)
    losses = landscape.evaluate_points(outcome.model, points, landscape.prepare(outcome.model, data, 50))
    assert losses["test_loss"].notna().all()


def test_the_largest_of_four_may_be_taken_before_the_relu():
    torch.manual_seed(0)
    model = models.build("lenet5", (3, 32, 32), 10)
    layers = list(model)
    for at in (1, 4):
        assert isinstance(layers[at], nn.MaxPool2d)
        layers[at], layers[at + 1] = layers[at + 1], layers[at]
    other = nn.Sequential(*layers)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    found = []
    for network in (model, other):
        network.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
