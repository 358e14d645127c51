"""What every optimizer must do with every smoothing: each built-in method is in here by itself.

All runs of a kind go into one pair of processes, for these take seconds to start.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from lbstudy.methods import configure, models, optimizers, smoothing
from lbstudy.methods.declaration import MethodError
from lbstudy.parallel.randomness import derive_seed
from lbstudy.study.run import GhostBatchNorm, RunSpec
from lbstudy.training.data import EpochImages
from lbstudy.training.train import EpochReport, Snapshot, evaluate, train
from tests.methods import examples
from tests.parallel import run_workers
from tests.training.test_train import digits, make_run

SAMPLES = 60  # of which 48 train
NET, DROPPING = "tests.networks:small", "tests.networks:dropping"
FREE = "schedulefree:SGDScheduleFree"


def possible(name: str) -> bool:
    try:
        return bool(smoothing.parts_of(name))
    except MethodError:
        return False


SINGLE = [name for name in smoothing.names() if name != smoothing.NONE]
PAIRS = [f"{a}+{b}" for a, b in combinations(SINGLE, 2) if possible(f"{a}+{b}")]


def largest() -> list[str]:
    """Combinations that no further smoothing can join."""
    found = []
    for size in range(len(SINGLE), 0, -1):
        for parts in combinations(SINGLE, size):
            if possible("+".join(parts)) and not any(set(parts) < set(smoothing.split(larger)) for larger in found):
                found.append("+".join(parts))
    return found


LARGEST = largest()


def covering(start: int) -> list[str]:
    """Largest combinations that together have every smoothing; which, depends on `start`."""
    start %= len(LARGEST)
    candidates, missing, found = LARGEST[start:] + LARGEST[:start], set(SINGLE), []
    while missing:
        found.append(max(candidates, key=lambda name: len(missing & set(smoothing.split(name)))))
        missing -= set(smoothing.split(found[-1]))
    return found


def run_of(optimizer: str, name: str, **keys: object) -> RunSpec:
    """Two epochs of three steps, the last mini-batch a shorter one."""
    dataset, _ = digits(SAMPLES, augment=["crop"])
    defaults = {"model": NET, "batch_size": 20, "budget": {"epochs": 2}, "precision": "fp64"}
    hyper = examples.hyper(optimizer, name)
    return make_run(dataset, optimizer=optimizer, smoothing=name, hyper=hyper, **{**defaults, **keys})


GHOSTS = {"batch_norm": {"ghost": 4}}


def few() -> dict[str, RunSpec]:
    """Every optimizer without smoothing and with every one of them, several at a time and others for each optimizer.
    Batch norm over ghost batches and over the mini-batch take turns."""
    runs = {}
    for place, optimizer in enumerate(optimizers.names()):
        for turn, name in enumerate([smoothing.NONE, *covering(place)]):
            runs[f"{optimizer} {name}"] = run_of(optimizer, name, **(GHOSTS if (place + turn) % 2 else {}))
    ghosts = [name for name in SINGLE if "ghost" in smoothing.get(name).Settings.model_fields]
    runs |= {f"{n} of ghosts": run_of("sgd", n, **GHOSTS, settings={n: {"ghost": 8}}) for n in ghosts}
    runs["kfac sam of ghosts"] = run_of("kfac", "sam", **GHOSTS, settings={"sam": {"ghost": 8, "adaptive": True}})
    return runs


def all_of_them() -> dict[str, RunSpec]:
    """Every optimizer with every smoothing and every two that can be combined."""
    return {
        f"{optimizer} {name} {batch_norm}": run_of(optimizer, name, batch_norm=batch_norm)
        for optimizer in optimizers.names()
        for name in [smoothing.NONE, *SINGLE, *PAIRS]
        for batch_norm in ("sync", {"ghost": 4})
    }


@dataclass
class Result:
    """What came of a run, and of its continuation after the first epoch."""

    numbers: torch.Tensor  # parameters, running statistics, those that are evaluated, losses; one vector
    fingerprint: str
    resumed: str


def results(runs: dict[str, RunSpec]) -> dict[str, Result]:
    """Each run, and again from its first epoch's snapshot."""
    _, data = digits(SAMPLES)
    found = {}
    for name, run in runs.items():
        snapshots: list[Snapshot] = []
        losses: list[float] = []

        def keep(
            report: EpochReport,
            snapshot: Callable[[], Snapshot],
            snapshots: list[Snapshot] = snapshots,
            losses: list[float] = losses,
        ) -> bool:
            snapshots.append(through_a_file(snapshot()))
            losses += [report.train_loss, report.val_loss]
            return False

        whole = train(run, data, on_epoch=keep)
        states = [snapshots[-1]["model"], snapshots[-1]["evaluated"]]
        tensors = [tensor.double().flatten() for state in states for tensor in state.values()]
        numbers = torch.cat([*tensors, torch.tensor(losses, dtype=torch.float64)])
        found[name] = Result(numbers, whole.fingerprint, train(run, data, resume=snapshots[0]).fingerprint)
    return found


def through_a_file(snapshot: Snapshot) -> Snapshot:
    file = io.BytesIO()
    torch.save(snapshot, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def problems(one: dict[str, Result], two: dict[str, Result], draws_itself: Iterable[str] = ()) -> list[str]:
    """What one worker and two do not agree on, and resumed runs that are not the uninterrupted ones to the bit."""
    found = []
    for name in one:
        distance = (one[name].numbers - two[name].numbers).abs().max().item()
        if not distance <= 1e-9 and name not in draws_itself:
            found.append(f"{name}: two workers differ by {distance:.1e}")
        for workers, result in (("one worker", one[name]), ("two workers", two[name])):
            if result.resumed != result.fingerprint:
                found.append(f"{name}: a resumed run on {workers} is another one")
    return found


DROPPING_RUNS = {f"dropout {name}": ("kfac", name) for name in (smoothing.NONE, LARGEST[-1])}


def others() -> dict[str, RunSpec]:
    """Networks and optimizers from elsewhere, as far as they are installed."""
    runs = {name: run_of(*methods, model=DROPPING) for name, methods in DROPPING_RUNS.items()}
    if find_spec("timm"):
        model = {"name": "timm:test_resnet", "stem": "small"}
        runs["timm"] = run_of("sgd", LARGEST[-1], model=model, budget={"steps": 4})
    if find_spec("schedulefree"):
        runs |= {f"schedule-free {name}": run_of(FREE, name) for name in (smoothing.NONE, "mixup+sam")}
    return runs


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    return results(few() | others())


@pytest.mark.long
def test_workers_and_interruptions_change_nothing(one: dict[str, Result]):
    assert problems(one, run_workers(2, results, few() | others()), draws_itself=DROPPING_RUNS) == []


@pytest.mark.slow
def test_workers_and_interruptions_change_nothing_for_resnet18():
    """Two steps at a low rate: depth and SAM amplify rounding, from 8e-12 after a step at 0.05 to 2e-5 after four."""
    model = {"name": "torchvision:resnet18", "stem": "small"}
    runs = {name: run_of("sgd", name, model=model, batch_size=48) for name in covering(1)}
    runs = {name: run.model_copy(update={"hyper": run.hyper | {"learning_rate": 1e-3}}) for name, run in runs.items()}
    assert problems(results(runs), run_workers(2, results, runs)) == []


@pytest.mark.slow
def test_workers_and_interruptions_change_nothing_for_any_two_smoothings():
    runs = all_of_them()
    assert problems(results(runs), run_workers(3, results, runs)) == []


@pytest.mark.long
def test_micro_batches_change_nothing(one: dict[str, Result]):
    parts = {name: run.model_copy(update={"micro_batch_size": 8}) for name, run in few().items() if run.ghost}
    assert len(parts) > len(optimizers.names())
    several = results(parts)
    assert problems({name: one[name] for name in parts}, several) == []


def test_evaluated_model_of_a_schedule_free_optimizer_is_its_average():
    """A plain loop of the package's own."""
    schedulefree = pytest.importorskip("schedulefree")
    run = run_of(FREE, smoothing.NONE, model="lenet5", budget={"epochs": 1})
    _, data = digits(SAMPLES)
    torch.manual_seed(derive_seed(run.seed, "initialisation"))
    model = models.build("lenet5", data.shape, data.classes).double()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=run.hyper["learning_rate"], weight_decay=1e-3)
    images = EpochImages(data, run.dataset, run.seed, 1, torch.float64)
    optimizer.train()
    for positions in torch.arange(len(data.train)).split(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images.images(positions)), images.labels(positions)).backward()
        optimizer.step()
    trained = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    outcome = train(run, data)
    for mine, theirs, before in zip(outcome.model.parameters(), model.parameters(), trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert not torch.equal(theirs, before)
    assert outcome.last.val_loss == pytest.approx(evaluate(model, data, data.validation, "fp64")[0], rel=1e-10)


def test_dropout_draws_anew_each_step_and_the_same_each_time():
    """Two steps on the same images at a rate of next to nothing: what changes the loss is the draw."""
    _, data = digits(SAMPLES)
    run = run_of("sgd", smoothing.NONE, model=DROPPING, batch_size=48)
    keys = {"learning_rate": 1e-12, "momentum": 0.0, "weight_decay": 0.0}
    run = run.model_copy(update={"hyper": keys, "dataset": run.dataset.model_copy(update={"augment": ()})})

    def losses(run: RunSpec) -> list[float]:
        found = []
        train(run, data, on_epoch=lambda report, _: found.append(report.train_loss))
        return found

    first, second = losses(run)
    torch.rand(7)  # wherever torch's generator stands
    assert losses(run) == [first, second]
    assert abs(first - second) > 1e-4
    parts = run.model_copy(update={"batch_norm": GhostBatchNorm(ghost=8), "micro_batch_size": 16})
    assert losses(parts) == losses(parts)
    whole = losses(parts.model_copy(update={"micro_batch_size": None}))
    assert abs(whole[0] - losses(parts)[0]) > 1e-4  # as documented: other parts, other draws


@pytest.mark.slow
@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "timm:resnet10t"])
def test_networks_that_drop_resume_to_the_bit(model: str):
    settings = {"drop_path_rate": 0.3, "drop_rate": 0.2} if model.startswith("timm") else {}
    run = run_of("sgd", "mixup", model={"name": model, "stem": "small", **settings}, precision="fp32")
    (result,) = results({"": run}).values()
    assert result.resumed == result.fingerprint


def test_every_number_that_must_be_given_has_an_example():
    for optimizer in optimizers.names():
        for name in SINGLE:
            examples.hyper(optimizer, name)


def test_a_number_without_an_example_says_where_to_put_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(examples.NUMBERS, "sam_radius")
    with pytest.raises(KeyError, match="sgd with sam needs `sam_radius`: put an example into NUMBERS of .*examples.py"):
        examples.hyper("sgd", "sam")


def test_combinations_are_found():
    assert {"mixup+noise", "label_smoothing+mixup", "cutmix+sam", "ema+sam"} <= set(PAIRS)
    assert all(any(set(smoothing.split(p)) <= set(smoothing.split(name)) for name in LARGEST) for p in PAIRS)


ONCE = [(optimizer, smoothing.NONE) for optimizer in optimizers.names()] + [("sgd", name) for name in SINGLE]
REST = [(o, name) for o in optimizers.names() for name in SINGLE if o != "sgd"]


@pytest.mark.parametrize(
    ("optimizer", "name"), [*ONCE, *(pytest.param(*methods, marks=pytest.mark.slow) for methods in REST)]
)
def test_learns_and_repeats(optimizer: str, name: str):
    """The digits in six epochs, in fp32, with Nesterov's momentum where there is one."""
    dataset, data = digits(augment=["crop"])
    known = configure.numbers_of(optimizer, name)
    hyper = examples.hyper(optimizer, name) | ({"nesterov": True} if "nesterov" in known else {})
    run = make_run(
        dataset, optimizer=optimizer, smoothing=name, budget={"epochs": 6}, batch_size=32, hyper=hyper,
        schedule={"name": "cosine", "warmup": 1},
    )  # fmt: skip
    snapshots: list[Snapshot] = []

    def keep(report: EpochReport, snapshot: Callable[[], Snapshot]) -> bool:
        snapshots.append(through_a_file(snapshot()))
        return False

    whole = train(run, data, on_epoch=keep)
    assert whole.last.val_accuracy > 0.8
    assert train(run, data, resume=snapshots[1]).fingerprint == whole.fingerprint  # and so repeats it


def test_another_seed_is_another_run():
    _, data = digits(SAMPLES)
    run = run_of("sgd", LARGEST[0], budget={"epochs": 1})
    assert train(run, data).fingerprint != train(run.model_copy(update={"seed": 4}), data).fingerprint
