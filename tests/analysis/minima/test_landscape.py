"""Landscapes against closed forms, the training code's own evaluation, and scikit-learn."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from lbstudy.analysis.minima import landscape
from lbstudy.analysis.minima.directions import DirectionSpec, draw
from lbstudy.analysis.minima.landscape import evaluate_points, prepare
from lbstudy.methods import models
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec, RunSpec
from lbstudy.training import data, datasets
from lbstudy.training.train import evaluate, fingerprint, train

SPEC = DirectionSpec(seed=7)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    spec = DatasetSpec(name="digits", validation_size=0.2)
    return data.place(datasets.load(spec), spec, split_seed=0)


@pytest.fixture(scope="module")
def images() -> data.ImageData:
    spec = DatasetSpec(name="synthetic", samples=60, validation_size=20)
    return data.place(datasets.load(spec), spec, split_seed=0)


def network(name: str, images: data.ImageData, seed: int = 0) -> nn.Module:
    """A network with batch-norm statistics of its own."""
    torch.manual_seed(seed)
    model = models.build(name, images.shape, images.classes)
    for key, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in key else 0))
    return model


class Quadratic(nn.Module):
    """A network whose cross-entropy is offset + (theta - m)^T H (theta - m) / 2 for every image of class 0."""

    def __init__(self, offset: float = 1.0):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.minimum = torch.randn(12, dtype=torch.float64)
        root = torch.randn(12, 12, dtype=torch.float64)
        self.hessian, self.offset = root @ root.T, offset

    def loss(self, weight: Tensor) -> Tensor:
        away = weight.flatten() - self.minimum
        return self.offset + away @ self.hessian @ away / 2

    def forward(self, images: Tensor) -> Tensor:
        # Cross-entropy of the logits (0, z) for class 0 is log(1 + e^z), which is the loss for this z.
        z = torch.log(torch.expm1(self.loss(self.weight)))
        return torch.stack([torch.zeros_like(z), z]).expand(len(images), 2)


def of_class_zero(images: data.ImageData) -> data.ImageData:
    def zero(part: data.Images) -> data.Images:
        return data.Images(part.pixels, torch.zeros_like(part.labels), part.rows)

    return data.ImageData(
        zero(images.train), zero(images.validation), zero(images.test), 2, images.mean, images.std
    )  # fmt: skip


class TestQuadratic:
    """A network whose landscape is known in closed form."""

    def test_lines(self, images: data.ImageData):
        model = Quadratic()
        points = landscape.line(model, SPEC, directions=3, a=landscape.grid(-0.1, 0.1, 5))
        result = evaluate_points(model, points, prepare(model, of_class_zero(images)))
        assert len(result) == 15
        for row in result.itertuples():
            moved = model.weight + row.a * draw(model, SPEC, row.direction)["weight"]
            assert row.train_loss == pytest.approx(model.loss(moved).item(), rel=1e-10)
            assert row.test_loss == pytest.approx(model.loss(moved).item(), rel=1e-10)

    def test_plane(self, images: data.ImageData):
        model = Quadratic()
        points = landscape.plane(model, SPEC, a=np.array([-0.1, 0, 0.05]), b=np.array([0, 0.1]))
        result = evaluate_points(model, points, prepare(model, of_class_zero(images)))
        assert len(result) == 6
        first, second = (draw(model, SPEC, index)["weight"] for index in (0, 1))
        for row in result.itertuples():
            moved = model.weight + row.a * first + row.b * second
            assert row.train_loss == pytest.approx(model.loss(moved).item(), rel=1e-10)

    def test_interpolation(self, images: data.ImageData):
        model = Quadratic()
        start, end = model.state_dict(), {"weight": torch.ones(3, 4, dtype=torch.float64)}
        result = evaluate_points(model, landscape.interpolate(model, start, end), prepare(model, of_class_zero(images)))
        for row in result.itertuples():
            moved = (1 - row.a) * start["weight"] + row.a * end["weight"]
            assert row.train_loss == pytest.approx(model.loss(moved).item(), rel=1e-10)


@pytest.mark.parametrize("name", ["lenet5", "vgg9"])
class TestSolutions:
    """Where a landscape passes through a solution it is what training reported."""

    def test_interpolation_ends_in_both(self, name: str, images: data.ImageData):
        one, other = network(name, images, 1), network(name, images, 2)
        points = landscape.interpolate(one, one.state_dict(), other.state_dict(), np.array([0.0, 0.5, 1.0]))
        result = evaluate_points(one, points, prepare(one, images)).set_index("a")
        for a, model in ((0, one), (1, other)):
            for split in ("train", "test"):
                loss, accuracy = evaluate(model, images, getattr(images, split))
                assert result.loc[a, f"{split}_loss"] == pytest.approx(loss, abs=1e-6)
                assert result.loc[a, f"{split}_accuracy"] == accuracy

    def test_lines_and_planes_pass_through_it(self, name: str, images: data.ImageData):
        model = network(name, images)
        batches = prepare(model, images)
        zero, some = np.array([0.0]), np.array([-0.3, 0.0, 0.3])
        line = evaluate_points(model, landscape.line(model, SPEC, 1, some), batches)
        plane = evaluate_points(model, landscape.plane(model, SPEC, some, zero), batches)
        assert line["train_loss"].tolist() == plane["train_loss"].tolist()  # the cross-section along the first axis
        loss, accuracy = evaluate(model, images, images.test)
        assert line["test_loss"][1] == pytest.approx(loss, abs=1e-6)
        assert line["test_accuracy"][1] == accuracy
        assert line["train_loss"].nunique() == 3

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_is_untouched(self, name: str, images: data.ImageData, training: bool):
        model = network(name, images).train(training)
        before, storage = fingerprint(model), [p.data_ptr() for p in model.parameters()]
        evaluate_points(model, landscape.line(model, SPEC, 1, np.array([0.5])), prepare(model, images, samples=10))
        assert fingerprint(model) == before
        assert [p.data_ptr() for p in model.parameters()] == storage
        assert all(module.training == training for module in model.modules())
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())


def test_the_model_is_untouched_by_a_failure(images: data.ImageData):
    model = network("vgg9", images)
    before = fingerprint(model)
    points = landscape.line(model, SPEC, 1, np.array([0.5]))
    five = data.Images(torch.zeros(2, 5, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    other = data.ImageData(five, five, five, 10, torch.zeros(5), torch.ones(5))
    with pytest.raises(RuntimeError, match="channels"):
        evaluate_points(model, points, prepare(model, other))
    assert fingerprint(model) == before
    assert model.training


def test_lines_look_along_the_scaled_draws(digits: data.ImageData):
    """The network at a point is the one that adding up the parameters by hand gives; its batch norm is as it was."""
    model = network("vgg9", digits)
    points = landscape.line(model, SPEC, 2, np.array([0.25]))
    few = prepare(model, digits, samples=30)
    result = evaluate_points(model, points, few)
    for index in range(2):
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(draw(model, SPEC, index)[name], alpha=0.25)
            losses = [nn.functional.cross_entropy(moved(x), y, reduction="sum").item() for x, y in few["test"]]
        assert result["test_loss"][index] == pytest.approx(sum(losses) / 30, rel=1e-5)


def linear(start: Tensor, end: Tensor, a: float) -> Tensor:
    return (1 - a) * start + a * end


def moved_by_hand(one: nn.Module, other: nn.Module, a: float) -> nn.Module:
    """The network at a on the way from one to the other: all is linear, but the logarithm of variance + eps."""
    moved, start, end = copy.deepcopy(one), one.state_dict(), other.state_dict()
    eps = {name: module.eps for name, module in one.named_modules() if isinstance(module, BatchNorm)}
    for name, tensor in moved.state_dict().items():
        if name.endswith("running_var"):
            scales = [(state[name].double() + eps[name.rpartition(".")[0]]).log() for state in (start, end)]
            tensor.copy_((linear(*scales, a).exp() - eps[name.rpartition(".")[0]]).clamp(min=0))
        elif tensor.is_floating_point():
            tensor.copy_(linear(start[name].double(), end[name].double(), a))
    return moved


class TestVariances:
    """From one solution to another, running variances stay variances."""

    @pytest.fixture(scope="class")
    @staticmethod
    def few(digits: data.ImageData) -> data.ImageData:
        parts = (data.Images(part.at(slice(32)), part.labels[:32]) for part in (digits.train, digits.validation))
        return data.ImageData(*parts, digits.test, digits.classes, digits.mean, digits.std)

    @pytest.fixture(scope="class")
    @staticmethod
    def solutions(few: data.ImageData) -> tuple[nn.Module, nn.Module]:
        """VGG9 after two epochs of either batch size, from different starts: their variances are far apart."""
        made = []
        for batch_size in (8, 32):
            run = {
                "model": "vgg9", "dataset": {"name": "digits", "validation_size": 0.2}, "batch_size": batch_size,
                "optimizer": "sgd", "hyper": {"learning_rate": 0.05}, "budget": {"epochs": 2}, "seed": batch_size,
            }  # fmt: skip
            made.append(train(RunSpec.model_validate(run), few).model.eval())
        with torch.no_grad():  # and a layer that has hardly any variance in one of them
            variance = dict(made[1].named_buffers())["features.1.running_var"]
            variance.div_(100)
        return made[0], made[1]

    def test_every_point_has_an_output_and_is_the_network_made_by_hand(
        self, digits: data.ImageData, solutions: tuple[nn.Module, nn.Module]
    ):
        one, other = solutions
        points = landscape.interpolate(one, one.state_dict(), other.state_dict(), np.array([-0.5, 0.3, 1.1, 1.5]))
        few = prepare(one, digits, samples=8)
        summed = evaluate_points(one, points._replace(variances=None), few)
        assert summed["test_loss"].isna().tolist()[1:] == [False, True, True]  # the straight line's, beyond
        result = evaluate_points(one, points, few)
        assert np.isfinite(result[["train_loss", "test_loss"]]).all(axis=None)
        for row in result.itertuples():
            network = moved_by_hand(one, other, row.a)
            with torch.no_grad():
                losses = [nn.functional.cross_entropy(network(x), y, reduction="sum").item() for x, y in few["test"]]
            assert row.test_loss == pytest.approx(sum(losses) / 8, rel=1e-4)

    def test_both_solutions_are_met_to_the_bit(self, digits: data.ImageData, solutions: tuple[nn.Module, nn.Module]):
        few = prepare(solutions[0], digits, samples=8)
        points = landscape.interpolate(solutions[0], *(m.state_dict() for m in solutions), np.array([0.0, 1.0]))
        result = evaluate_points(solutions[0], points, few)
        for row, model in zip(result.itertuples(), solutions, strict=True):
            logits = [(model(x).detach(), y) for x, y in few["test"]]
            loss = sum(nn.functional.cross_entropy(out.double(), y, reduction="sum") for out, y in logits) / 8
            assert row.test_loss == loss.item()

    def test_a_variance_of_zero_is_no_hole(self):
        """From 1e-2 to 0, and from 0 to 0: geometric in v + eps, and never negative."""
        one, other = BatchNorm(2), BatchNorm(2)
        one.running_var.copy_(torch.tensor([1e-2, 0.0]))
        other.running_var.zero_()
        points = landscape.interpolate(one, one.state_dict(), other.state_dict())
        assert points.variances is not None
        assert points.variances.entries.tolist() == [6, 7]  # after weight, bias and running mean
        for a in (-0.5, 0.5, 1.5):
            found = landscape._geometric_mean([(1 - a, points.basis[0]), (a, points.basis[1])], points.variances)
            expected = max(0.0, (1e-2 + 1e-5) ** (1 - a) * 1e-5**a - 1e-5)
            assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-6, abs=1e-18)


class TestNotFinite:
    def test_overflow_is_recorded(self, digits: data.ImageData):
        model = network("lenet5", digits)
        points = landscape.line(model, SPEC, 1, np.array([-1e12, 0, 1e12]))
        result = evaluate_points(model, points, prepare(model, digits, samples=20))
        assert len(result) == 3
        assert np.isfinite(result["train_loss"]).tolist() == [False, True, False]

    def test_a_solution_that_diverged_does_not_spoil_the_other(self, digits: data.ImageData):
        one, other = network("lenet5", digits, 1), network("lenet5", digits, 2)
        with torch.no_grad():
            next(other.parameters()).fill_(math.inf)
        points = landscape.interpolate(one, one.state_dict(), other.state_dict(), np.array([0.0, 0.5, 1.0]))
        result = evaluate_points(one, points, prepare(one, digits))
        assert result["train_loss"][0] == pytest.approx(evaluate(one, digits, digits.train)[0], abs=1e-6)
        assert result["train_loss"][1:].isna().all()


class TestTrajectory:
    @pytest.fixture(scope="class")
    @staticmethod
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))

    @pytest.fixture(scope="class")
    @staticmethod
    def run(model: nn.Module) -> list[dict[str, Tensor]]:
        """A wandering network: its parameters move, and its batch-norm statistics far more."""
        states = []
        for step in range(5):
            torch.manual_seed(step)
            moved = copy.deepcopy(model).double()
            for name, tensor in moved.state_dict().items():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor), alpha=100 if "running" in name else 0.01 * (5 - step))
            states.append(moved.state_dict())
        return states

    def test_is_scikit_learns_pca(self, model: nn.Module, run: list[dict[str, Tensor]]):
        found = landscape.trajectory(model, run, count=3)
        names = [name for name, _ in model.named_parameters()]
        rows = np.stack([torch.cat([(state[n] - run[-1][n]).flatten() for n in names]).numpy() for state in run])
        pca = PCA(2, svd_solver="full").fit(rows)
        axes = pca.components_ * np.sign(pca.components_ @ rows[0])[:, None]
        np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, rtol=1e-9)
        np.testing.assert_allclose(found.path, rows @ axes.T, rtol=1e-6, atol=1e-9)
        assert found.path[-1].tolist() == [0, 0]
        for ours, theirs in zip(found.points.basis[1:], axes, strict=True):
            moves = parts(ours, run[0])
            np.testing.assert_allclose(torch.cat([moves[n].flatten() for n in names]), theirs, atol=1e-9)

    def test_statistics_are_those_of_the_end(self, model: nn.Module, run: list[dict[str, Tensor]]):
        final, *axes = landscape.trajectory(model, run, count=3).points.basis
        assert torch.equal(final, landscape.flatten(run[-1]))
        for axis in axes:
            assert not any(part.any() for name, part in parts(axis, run[0]).items() if "running" in name)

    def test_the_grid_contains_the_path(self, model: nn.Module, run: list[dict[str, Tensor]]):
        found = landscape.trajectory(model, run, count=5, margin=0.1)
        axes = found.points.coordinates[["a", "b"]].to_numpy()
        assert len(axes) == 25
        extent = found.path.max(0) - found.path.min(0)
        np.testing.assert_allclose(axes.min(0), found.path.min(0) - 0.1 * extent)
        np.testing.assert_allclose(axes.max(0), found.path.max(0) + 0.1 * extent)

    def test_a_path_in_a_plane_is_reproduced(self, digits: data.ImageData):
        """Three checkpoints span a plane, so its points at their coordinates are the checkpoints."""
        run = [network("lenet5", digits, seed) for seed in range(3)]
        found = landscape.trajectory(run[0], [model.state_dict() for model in run])
        at = landscape.Points(
            found.points.coordinates[:3], np.column_stack([np.ones(3), found.path]), found.points.basis
        )
        result = evaluate_points(run[0], at, prepare(run[0], digits))
        for loss, model in zip(result["train_loss"], run, strict=True):
            assert loss == pytest.approx(evaluate(model, digits, digits.train)[0], abs=1e-5)
        assert found.explained.sum() == pytest.approx(1)

    def test_what_has_no_plane_is_refused(self, digits: data.ImageData):
        model = network("lenet5", digits)
        with pytest.raises(StudyError, match="2 checkpoints"):
            landscape.trajectory(model, [model.state_dict()] * 2)
        diverged = {name: tensor / 0 for name, tensor in model.state_dict().items()}
        with pytest.raises(StudyError, match="not finite"):
            landscape.trajectory(model, [model.state_dict(), model.state_dict(), diverged])


def parts(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A flat state by name."""
    floating = [name for name, tensor in like.items() if tensor.is_floating_point()]
    return dict(zip(floating, flat.split([like[name].numel() for name in floating]), strict=True))


class TestSamples:
    def test_all_by_default(self, digits: data.ImageData):
        model = network("lenet5", digits)
        batches = prepare(model, digits)
        result = evaluate_points(model, landscape.line(model, SPEC, 1, np.array([0.0])), batches)
        assert result["train_samples"].tolist() == [len(digits.train)]
        assert result["test_samples"].tolist() == [len(digits.test)]
        shown = torch.cat([x for x, _ in batches["train"]])
        torch.testing.assert_close(shown.mean().item(), 0.0, atol=1e-4, rtol=0)
        torch.testing.assert_close(shown.std().item(), 1.0, atol=1e-3, rtol=0)

    def test_a_subset_is_the_beginning_of_a_permutation(self, digits: data.ImageData):
        model = network("lenet5", digits)
        few, more, other = (
            torch.cat([x for x, _ in prepare(model, digits, samples, seed)["train"]])
            for samples, seed in ((10, 0), (20, 0), (10, 1))
        )
        assert few.shape[0] == 10
        assert torch.equal(few, more[:10])
        assert not torch.equal(few, other)
        result = evaluate_points(model, landscape.line(model, SPEC, 1), prepare(model, digits, 10))
        assert set(result["train_samples"]) == {10}

    def test_more_than_there_are_is_all(self, digits: data.ImageData):
        batches = prepare(network("lenet5", digits), digits, samples=10**6)
        assert sum(len(y) for _, y in batches["train"]) == len(digits.train)

    def test_what_is_not_kept_is_normalised_again(self, digits: data.ImageData, monkeypatch: pytest.MonkeyPatch):
        model = network("lenet5", digits)
        at = landscape.line(model, SPEC, 1, np.array([0.0, 0.5]))
        kept = evaluate_points(model, at, prepare(model, digits, 600))
        monkeypatch.setattr(landscape, "KEPT_IMAGES", 0)
        again = prepare(model, digits, 600)
        first, second = next(iter(again["train"]))[0], next(iter(again["train"]))[0]
        assert first.data_ptr() != second.data_ptr()
        pd.testing.assert_frame_equal(evaluate_points(model, at, again), kept, check_exact=True)

    def test_none_is_refused(self, digits: data.ImageData):
        with pytest.raises(StudyError, match="samples: 0"):
            prepare(network("lenet5", digits), digits, samples=0)


def test_batches_fit_the_cache():
    for name, largest in (("lenet5", 6 * 28 * 28), ("vgg9", 64 * 32 * 32)):
        model = models.build(name, (3, 32, 32), 10)
        assert landscape.batch_size(model, (3, 32, 32)) == landscape.LARGEST_OUTPUT["cpu"] // (4 * largest)


def test_default_grids_contain_the_solutions():
    assert 0.0 in landscape.LINE
    assert 0.0 in landscape.PLANE
    assert {0.0, 1.0} <= set(landscape.INTERPOLATION)
    assert (len(landscape.LINE), len(landscape.PLANE)) == (51, 25)
