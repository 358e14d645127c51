"""Within an epoch the host asks the device for work and never waits for it.

A GPU is not needed to see that: what would make the host wait is known by name. Values that come to the host are read
by `item` and its kin, sizes that depend on values by `nonzero` and its kin; and a copy of the host's numbers to the
device waits unless it is `to_device`'s.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbstudy.methods import optimizers, smoothing
from lbstudy.study.run import RunSpec
from lbstudy.training import train as training
from tests.training.test_battery import DROPPING, LARGEST, SAMPLES, covering, run_of
from tests.training.test_train import digits

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
TO_HOST = ("tolist", "cpu", "numpy", "__array__")
TO_DEVICE = ("tensor", "as_tensor", "from_numpy")


def called_from(*files: str) -> bool:
    """Whether one of these files is among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(files):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Watch(TorchDispatchMode):
    """Notes operators that wait, while armed. torch's optimizers count steps in tensors that are on the host always."""

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.waits = False, list[str]()

    def note(self, what: str) -> None:
        if self.armed and not called_from("torch/optim/adam.py", "torch/optim/sgd.py"):
            self.waits.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in READS or masks:
            self.note(name + (" with a mask" if masks else ""))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Within it, `train()`'s steps are watched, but for the first."""
    watch, set_rate, total = Watch(), optimizers.RunCourse.set, training.Workers.sum

    def begin_step(course: optimizers.RunCourse, step: int) -> float:
        watch.armed = step > 0
        return set_rate(course, step)

    def end_epoch(workers: training.Workers, tensor: torch.Tensor) -> torch.Tensor:
        watch.armed = False
        return total(workers, tensor)

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            if not called_from("lbstudy/parallel/device.py"):
                watch.note(name)
            return function(*args, **keys)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(optimizers.RunCourse, "set", begin_step)
        patch.setattr(training.Workers, "sum", end_epoch)
        for name in (*TO_HOST, "new_tensor"):
            patch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
        for name in TO_DEVICE:
            patch.setattr(torch, name, noted(name, getattr(torch, name)))
        with watch:
            yield watch


def waits(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What made the host wait in the steps of a run's first epoch, but for the first."""
    _, data = digits(SAMPLES)
    with watched(monkeypatch) as watch:
        training.train(run, data)
    return watch.waits


def of(optimizer: str, name: str, hyper: dict[str, Any] | None = None, **keys: object) -> RunSpec:
    run = run_of(optimizer, name, **{"budget": {"epochs": 1}, "precision": "fp32", **keys})
    intervals = {"inverse_interval": 100} if optimizer == "kfac" else {}
    return run.model_copy(update={"hyper": run.hyper | intervals | (hyper or {})})


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(o, name) for place, o in enumerate(optimizers.names()) for name in (smoothing.NONE, *covering(place))],
)
def test_no_step_waits(optimizer: str, name: str, monkeypatch: pytest.MonkeyPatch):
    assert waits(of(optimizer, name), monkeypatch) == []


OTHERS = {
    "clipping": of("sgd", "none", {"gradient_clip": 0.1}),
    "bf16": of("sgd", LARGEST[0], precision="bf16", model="lenet5"),
    "micro-batches": of("kfac", "mixup+noise", batch_norm={"ghost": 4}, micro_batch_size=8),
    "coefficients of samples": of("sgd", "mixup", settings={"mixup": {"per": "sample"}}),
    "filter noise": of("sgd", "noise", settings={"noise": {"scale": "filter", "copies": 2}}),
    "noise that stays": of("sgd", "noise", settings={"noise": {"denoise": False}}),
    "adaptive SAM": of("sgd", "sam", settings={"sam": {"adaptive": True}}),
    "drawn labels": of("kfac", "mixup", {"kl_clip": 1e-3}, settings={"kfac": {"fisher": "monte_carlo"}}),
    "undecayed": of("lamb", "none", weight_decay_of="weights"),
    "dropout": of("sgd", "none", model=DROPPING),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_step_waits_in_other_forms(name: str, monkeypatch: pytest.MonkeyPatch):
    assert waits(OTHERS[name], monkeypatch) == []


def test_an_inversion_waits_once(monkeypatch: pytest.MonkeyPatch):
    """For the outcome of all decompositions together; there are two steps after the first."""
    assert waits(of("kfac", "none", {"inverse_interval": 1}), monkeypatch) == ["tolist"] * 2


class Waiting(torch.optim.SGD):
    """One of every kind."""

    def step(self, closure: Any = None) -> Any:
        """One update."""
        gradient = self.param_groups[0]["params"][0].grad
        float(gradient.sum())
        gradient[gradient > 0].sum()
        gradient.new_tensor([1.0])
        torch.from_numpy(gradient.detach().cpu().numpy())
        return super().step(closure)


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch):
    run = of("sgd", "none").model_copy(update={"optimizer": f"{__name__}:Waiting", "hyper": {"learning_rate": 0.1}})
    expected = ["_local_scalar_dense", "index with a mask", "new_tensor", "cpu", "numpy", "from_numpy"]
    assert waits(run, monkeypatch) == expected * 2


def test_kernels_on_a_gpu_are_exact_and_repeatable():
    _, data = digits(SAMPLES)
    cudnn, found = torch.backends.cudnn, list[tuple[bool, bool, bool]]()

    def flags() -> tuple[bool, bool, bool]:
        return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before = flags()
    training.train(of("sgd", "none"), data, on_epoch=lambda report, snapshot: found.append(flags()) or False)
    assert found == [(False, True, False)]
    assert flags() == before != found[0]
