"""Replayed passes change no bit of any run.

Where there is no GPU the capture is played by `Remembered`, which keeps its inputs, outputs and gradients where a graph
would keep them: in memory of its own, which the next pass writes over.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbstudy.methods import models, optimizers, smoothing
from lbstudy.study.run import RunSpec
from lbstudy.training import graphs
from lbstudy.training.data import ImageData
from lbstudy.training.loop import Loop
from lbstudy.training.train import Snapshot, train
from tests.training.test_battery import LARGEST, covering, run_of, through_a_file
from tests.training.test_train import digits

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HAS_ROOM = graphs.has_room
SAMPLES = 60  # of which 48 train: two mini-batches of 20 in an epoch, and one of 8
DROPPING = "torchvision:mobilenet_v3_small"


class Remembered(nn.Module):
    """A network's passes as a graph has them."""

    def __init__(self, network: nn.Module, images: Tensor):
        super().__init__()
        parameters = [p for p in network.parameters() if p.requires_grad]
        inputs, outputs, gradients = images.clone(), list[Tensor](), [torch.zeros_like(p) for p in parameters]

        class Pass(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, images: Tensor, *parameters: Tensor) -> Tensor:
                inputs.copy_(images)
                with torch.enable_grad():
                    ctx.logits = network(inputs)
                outputs[:] = outputs or [torch.empty_like(ctx.logits, requires_grad=False)]
                return outputs[0].copy_(ctx.logits.detach()).detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                found = torch.autograd.grad(ctx.logits, parameters, gradient, allow_unused=True)
                for kept, new in zip(gradients, found, strict=True):
                    if new is not None:
                        kept.copy_(new)
                return None, *(
                    None if new is None else kept.detach() for kept, new in zip(gradients, found, strict=True)
                )

        self._pass = lambda images: Pass.apply(images, *parameters)

    def forward(self, images: Tensor) -> Tensor:
        return self._pass(images)


class Counted(nn.Module):
    """A captured network that counts."""

    def __init__(self, replay: nn.Module):
        super().__init__()
        self.replay, self.replays = replay, 0

    def forward(self, images: Tensor) -> Tensor:
        self.replays += 1
        return self.replay(images)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """Everything that was captured, which counts its replays."""
    found = list[Counted]()
    capture: Callable[[nn.Module, Tensor], nn.Module] = graphs.capture if GPU else Remembered

    def counted(network: nn.Module, images: Tensor) -> nn.Module:
        found.append(Counted(capture(network, images)))
        return found[-1]

    monkeypatch.setattr(graphs, "capture", counted)
    monkeypatch.setattr(graphs, "DEVICES", (DEVICE.type,))
    if not GPU:
        monkeypatch.setattr(graphs, "has_room", lambda device, share: True)
    return found


def of(optimizer: str, name: str, hyper: dict[str, Any] | None = None, **keys: Any) -> RunSpec:
    """Three epochs of three steps."""
    run = run_of(optimizer, name, **{"model": "resnet8", "precision": "fp32", "budget": {"epochs": 3}, **keys})
    return run.model_copy(update={"hyper": run.hyper | (hyper or {})})


def images() -> ImageData:
    return digits(SAMPLES, DEVICE)[1]


def fingerprints(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run with replayed passes, of its continuation after the first epoch, and of the same run without."""
    there, snapshots = images(), list[Snapshot]()
    replayed = train(run, there, on_epoch=lambda report, snapshot: bool(snapshots.append(through_a_file(snapshot()))))
    resumed = train(run, there, resume=snapshots[0])
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICES", ())
        return [replayed.fingerprint, resumed.fingerprint, train(run, there).fingerprint]


FORMS = {
    "lenet5": of("sgd", "none", model="lenet5"),
    "clipping": of("sgd", "none", {"gradient_clip": 0.1}),
    "bf16": of("sgd", LARGEST[0], precision="bf16", model="lenet5"),
    "ghost batches": of("kfac", "mixup+noise", {"factor_interval": 2}, batch_norm={"ghost": 4}),
    "drawn labels": of("kfac", "mixup", {"factor_interval": 2}, settings={"kfac": {"fisher": "monte_carlo"}}),
    "adaptive SAM": of("sgd", "sam", settings={"sam": {"adaptive": True}}),
    "dropout": of("sgd", "none", model=DROPPING),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_replayed_run_is_the_same_in_other_forms(
    form: str, captured: list[Counted], monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    assert len(set(fingerprints(FORMS[form], monkeypatch))) == 1
    assert [passes.replays > 1 for passes in captured] == [True, True]


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(o, smoothing.NONE) for o in optimizers.names()]
    + [
        pytest.param(o, name, marks=pytest.mark.long)
        for place, o in enumerate(optimizers.names())
        for name in covering(place)
    ],
)
def test_a_replayed_run_is_the_same(
    optimizer: str, name: str, captured: list[Counted], monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    run = of(optimizer, name, {"factor_interval": 2} if optimizer == "kfac" else None)
    assert len(set(fingerprints(run, monkeypatch))) == 1
    assert [passes.replays > 1 for passes in captured] == [True, True]


def test_what_is_replayed(captured: list[Counted]):
    """Whole mini-batches after the first epoch, and the pass that shows whether it may; not evaluations."""
    run = of("sgd", "none")
    train(run, images())
    assert [passes.replays for passes in captured] == [1 + 2 * 2]


def test_a_pass_that_is_listened_to_is_not_replayed(captured: list[Counted]):
    """Of the six steps of two epochs K-FAC looks at every other, and two are short; the first of the epochs is the
    fourth of the run."""
    run = of("kfac", "none", {"factor_interval": 2})
    train(run, images())
    replayed = sum(step % 2 == 1 and step % 3 != 2 for step in range(3, 9))
    assert [passes.replays for passes in captured] == [1 + replayed]


NOT = {
    "a network of the user's": of("sgd", "none", model="tests.networks:small"),
    "a network of timm's": of("sgd", "none", model="timm:test_resnet"),
    "an optimizer of the user's": of("sgd", "none").model_copy(
        update={"optimizer": "torch.optim:RMSprop", "hyper": {"learning_rate": 0.01}}
    ),
    "several passes": of("sgd", "none", micro_batch_size=10),
    "several copies": of("sgd", "noise", settings={"noise": {"copies": 2}}),
    "compiled": of("sgd", "none", compile=True),
    "statistics at every pass": of("kfac", "none"),
    "no whole mini-batch": of("sgd", "none", batch_size=64),
}


def loop_of(run: RunSpec) -> tuple[Loop, ImageData]:
    there = images()
    model = models.build(run.model.name, there.shape, there.classes, run.ghost, run.model.settings)
    return Loop.of(run, model.to(DEVICE), 3), there


@pytest.mark.parametrize("case", NOT)
def test_what_is_not_captured(case: str, captured: list[Counted]):
    loop, there = loop_of(NOT[case])
    assert graphs.replaying(loop, there) is loop
    assert captured == []


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError, RuntimeError])
def test_what_cannot_be_captured_after_all(refusal: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def refuse(network: nn.Module, images: Tensor) -> nn.Module:
        raise refusal

    monkeypatch.setattr(graphs, "capture", refuse)
    loop, there = loop_of(of("sgd", "none"))
    assert graphs.replaying(loop, there) is loop


@pytest.mark.parametrize(("gpu_share", "enough"), [(1.0, True), (0.25, True), (0.2, False)])
def test_room_is_for_twice_what_an_epoch_takes(gpu_share: float, enough: bool, monkeypatch: pytest.MonkeyPatch):
    """Here of 100 bytes 5 are always there and held as 10, and steps have taken 7 more."""
    for name, value in {"max_memory_allocated": 12, "memory_allocated": 5, "memory_reserved": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(graphs, "release", lambda device: None)
    assert HAS_ROOM(DEVICE, gpu_share) is enough
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (13, 100))
    assert HAS_ROOM(DEVICE, gpu_share) is False


@pytest.mark.parametrize("what", ["images", "gradients"])
def test_a_replay_that_gives_something_else_is_not_used(what: str, monkeypatch: pytest.MonkeyPatch):
    """As that of a network would that decides by the numbers it sees."""

    class Stuck(nn.Module):
        def __init__(self, network: nn.Module, images: Tensor):
            super().__init__()
            self.network, self.images = network, images

        def forward(self, images: Tensor) -> Tensor:
            logits = self.network(self.images if what == "images" else images)
            if what == "gradients":
                logits.register_hook(lambda gradient: gradient * 1.5)
            return logits

    monkeypatch.setattr(graphs, "capture", Stuck)
    loop, there = loop_of(of("sgd", "none"))
    assert graphs.replaying(loop, there) is loop
