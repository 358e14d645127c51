"""A run is a function of its spec alone: not of workers, micro-batches, interruptions or what ran before it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lbstudy.methods import configure, models
from lbstudy.methods.smoothing import Draw
from lbstudy.methods.smoothing.noise import Numbers, ParameterNoise, Settings
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.study.run import DatasetSpec, RunSpec
from lbstudy.training.data import EpochImages, ImageData, place
from lbstudy.training.dataset import Dataset
from lbstudy.training.datasets import load
from lbstudy.training.train import Outcome, evaluate, train
from tests.methods import examples
from tests.parallel import run_workers

SMOOTHINGS = ["none", "mixup", "noise", "mixup+noise"]
MODELS = {"lenet5": "sync", "vgg9-sync": "sync", "vgg9-ghost": {"ghost": 8}}


def digits(
    samples: int | None = None, device: torch.device | str = "cpu", **keys: object
) -> tuple[DatasetSpec, ImageData]:
    """The digits, or fewer of them."""
    spec = DatasetSpec(name="digits", validation_size=0.2, **keys)
    full = load(spec)
    part = Dataset(
        full.train_images[:samples], full.train_labels[:samples], full.test_images, full.test_labels, full.classes
    )
    return spec, place(part, spec, 0, device)


def make_run(dataset: DatasetSpec, **keys: object) -> RunSpec:
    hyper = {**examples.NUMBERS, "learning_rate": 0.05}
    defaults: dict[str, object] = {
        "model": "lenet5", "dataset": dataset, "batch_size": 64, "optimizer": "sgd", "budget": {"epochs": 1}, "seed": 3,
    }  # fmt: skip
    hyper |= keys.pop("hyper", {})  # type: ignore[arg-type]
    known = configure.numbers_of(str(keys.get("optimizer", "sgd")), str(keys.get("smoothing", "none")))
    hyper = {name: value for name, value in hyper.items() if name in known}
    return RunSpec.model_validate({**defaults, "hyper": hyper, **keys})


def final_parameters(runs: dict[str, RunSpec], samples: int | None) -> dict[str, torch.Tensor]:
    """Parameters, running statistics and losses after each run, as one vector a run."""
    _, data = digits(samples)
    vectors = {}
    for name, run in runs.items():
        outcome = train(run, data)
        tensors = [t.double().flatten() for t in outcome.model.state_dict().values()]
        vectors[name] = torch.cat([*tensors, torch.tensor([outcome.last.val_loss, outcome.last.train_loss])]).detach()
    return vectors


def model_by_smoothing(models: list[str], samples: int | None, batch_size: int) -> dict[str, RunSpec]:
    dataset, _ = digits(samples, augment=["crop"])
    return {
        f"{model} {smoothing}": make_run(
            dataset, model=model.split("-")[0], batch_norm=MODELS[model], smoothing=smoothing, precision="fp64",
            batch_size=batch_size,
        )
        for model in models
        for smoothing in SMOOTHINGS
    }  # fmt: skip


def assert_workers_agree(runs: dict[str, RunSpec], samples: int | None, workers: int = 2) -> None:
    one, several = (run_workers(size, final_parameters, runs, samples) for size in (1, workers))
    for name in runs:
        torch.testing.assert_close(several[name], one[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_one_worker_and_two_give_the_same_parameters():
    # 40 training samples in mini-batches of 16: the last one of 8 leaves the second worker no ghost batch of its own
    assert_workers_agree(model_by_smoothing(["lenet5"], 50, 16), 50)


@pytest.mark.slow
def test_one_worker_and_two_agree_on_vgg9():
    assert_workers_agree(model_by_smoothing(["vgg9-sync", "vgg9-ghost"], 50, 16), 50)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_one_worker_and_two_agree_on_all_digits(model: str):
    assert_workers_agree(model_by_smoothing([model], None, 64), None)


@pytest.mark.long
def test_workers_share_ghost_batches_and_copies():
    dataset, _ = digits(300)
    noises = [{"ghost": 16}, {"copies": 3}, {"ghost": 32, "copies": 2, "scale": "filter"}, {"denoise": False}]
    runs = {str(n): make_run(dataset, smoothing="mixup+noise", noise=n, precision="fp64") for n in noises}
    assert_workers_agree(runs, 300, workers=3)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize(
    ("model", "batch_norm"), [("lenet5", "sync"), pytest.param("vgg9", {"ghost": 8}, marks=pytest.mark.slow)]
)
def test_micro_batches_change_nothing(model: str, batch_norm: object, smoothing: str):
    dataset, _ = digits(100)
    run = make_run(dataset, model=model, batch_norm=batch_norm, smoothing=smoothing, precision="fp64", batch_size=50)
    result = final_parameters({"whole": run, "parts": run.model_copy(update={"micro_batch_size": 16})}, 100)
    torch.testing.assert_close(result["parts"], result["whole"], rtol=0, atol=1e-9)


@pytest.mark.long
def test_statistics_are_those_of_the_evaluated_weights(monkeypatch: pytest.MonkeyPatch):
    dataset, data = digits(100, augment=["crop"])
    keys = {"model": "vgg9", "batch_norm": {"ghost": 8}, "batch_size": 32, "precision": "fp64", "seed": 5}
    run = make_run(dataset, smoothing="noise", hyper={"noise_magnitude": 0.1}, **keys)
    model = train(run, data).model
    images = EpochImages(data, dataset, run.seed, epoch=1, dtype=torch.float64)
    batches = [images.images(torch.arange(start, min(start + 8, 80))) for start in range(0, 80, 8)]
    theirs = models.build("vgg9", data.shape, data.classes).double()
    theirs.load_state_dict(model.state_dict())
    for module in theirs.modules():
        module.ghost = None  # each batch is whole
    expected = average_statistics(theirs, batches)
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    # fewer samples than an epoch has: its last mini-batches
    monkeypatch.setattr("lbstudy.training.train.STATISTICS_SAMPLES", 40)
    fewer = train(run, data).model  # mini-batches of 32, 32 and 16: the last two hold 40
    for name, value in average_statistics(theirs, batches[4:]).items():
        torch.testing.assert_close(fewer.state_dict()[name], value, msg=name)


def average_statistics(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the batches of each batch-norm layer's mean and unbiased variance, taken from its inputs."""
    seen: dict[str, list[torch.Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].transpose(0, 1).flatten(1)
            seen.setdefault(f"{name}.running_mean", []).append(values.mean(1))
            seen.setdefault(f"{name}.running_var", []).append(values.var(1))

        return hook

    hooks = [m.register_forward_pre_hook(look(n)) for n, m in model.named_modules() if isinstance(m, BatchNorm)]
    with torch.no_grad():
        for batch in batches:
            model.train()(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values).mean(0) for name, values in seen.items()}


def test_budget_in_steps_ends_within_an_epoch():
    dataset, data = digits(300)  # 240 training samples: 4 steps an epoch
    last = train(make_run(dataset, budget={"steps": 6}), data).last
    assert (last.epoch, last.step) == (2, 6)


def test_copies_average_the_gradients_of_perturbed_weights():
    dataset, data = digits(100)
    keys = {"precision": "fp64", "batch_size": 80, "hyper": {"momentum": 0, "weight_decay": 0}}
    start = train(make_run(dataset, **keys, smoothing="none", budget={"steps": 1}).model_copy(
        update={"hyper": make_run(dataset, **keys).hyper | {"learning_rate": 1e-300}}), data).model  # fmt: skip
    gradients = []
    noise = ParameterNoise(start, Numbers(noise_magnitude=0.01), Settings(copies=3), seed=3)
    for copy in range(3):
        start.zero_grad()
        with noise.perturbed(Draw(0, copy=copy)):
            images = data.plain(data.train, slice(None), torch.float64)
            torch.nn.functional.cross_entropy(start.train()(images), data.train.labels).backward()
        gradients.append([p.grad.clone() for p in start.parameters()])
    run = make_run(dataset, **keys, smoothing="noise", noise={"copies": 3})
    for before, after, *parts in zip(start.parameters(), train(run, data).model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(after, before - 0.05 * sum(parts) / 3, rtol=0, atol=1e-12)


def test_divergence_ends_the_run():
    dataset, data = digits(300)
    outcome: Outcome = train(make_run(dataset, budget={"epochs": 9}, hyper={"learning_rate": 1e9}), data)
    assert outcome.diverged
    assert outcome.last.epoch < 9


def test_on_epoch_ends_the_run():
    dataset, data = digits(300)
    outcome = train(make_run(dataset, budget={"epochs": 9}), data, on_epoch=lambda report, _: report.epoch == 2)
    assert outcome.last.epoch == 2
    assert not outcome.diverged


def test_gradient_is_clipped_to_the_global_norm():
    dataset, data = digits(300)
    run = make_run(dataset, batch_size=240, hyper={"gradient_clip": 1e-3, "momentum": 0, "weight_decay": 0})
    steps = []
    for epochs in (1, 2):
        outcome = train(run.model_copy(update={"budget": run.budget.model_copy(update={"epochs": epochs})}), data)
        steps.append(torch.cat([p.detach().flatten() for p in outcome.model.parameters()]))
    assert torch.dist(*steps).item() == pytest.approx(0.05 * 1e-3, rel=1e-3)
    assert outcome.last.gradient_norm > 1e-3


def test_last_minibatch_counts_by_its_size_or_is_dropped():
    dataset, data = digits(300)  # 240 training samples
    run = make_run(dataset, batch_size=100, hyper={"learning_rate": 1e-12})
    last = train(run, data).last
    assert last.step == 3
    model = train(run, data).model
    assert last.train_loss == pytest.approx(evaluate(model, data, data.train)[0], rel=1e-5)
    dropped = run.model_copy(update={"dataset": dataset.model_copy(update={"drop_last": True})})
    assert train(dropped, data).last.step == 2


def test_bf16_trains_close_to_fp32():
    dataset, data = digits()
    run = make_run(dataset, budget={"epochs": 10}, batch_size=32)
    outcome = train(run.model_copy(update={"precision": "bf16"}), data)
    assert abs(outcome.last.val_accuracy - train(run, data).last.val_accuracy) < 0.1
    assert all(p.dtype == torch.float32 for p in outcome.model.parameters())


@pytest.mark.slow
def test_compiled_model_trains_like_the_plain_one():
    dataset, data = digits(300)
    run = make_run(dataset, model="vgg9", batch_norm={"ghost": 32}, budget={"epochs": 1})
    plain, compiled = train(run, data), train(run.model_copy(update={"compile": True}), data)
    assert compiled.last.train_loss == pytest.approx(plain.last.train_loss, rel=1e-3)
