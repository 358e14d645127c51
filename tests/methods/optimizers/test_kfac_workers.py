"""K-FAC on several workers takes the same path as on one: factors, inverses and drawn labels are shared out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.methods.optimizers.kfac import KFAC
from lbstudy.parallel.batch_norm import BatchNorm
from lbstudy.parallel.workers import Workers
from lbstudy.study.load import find_study
from lbstudy.study.run import RunSpec
from lbstudy.training.data import worker_slice
from tests.parallel import run_workers
from tests.training.test_train import MODELS, SMOOTHINGS, digits, final_parameters, make_run


def kfac_runs(samples: int | None, model: str, batch_size: int, **keys: object) -> dict[str, RunSpec]:
    """A run for each smoothing."""
    dataset, _ = digits(samples, augment=["crop"])
    return {
        f"{model} {smoothing} {keys}": make_run(
            dataset, optimizer="kfac", model=model.split("-")[0], batch_norm=MODELS[model], smoothing=smoothing,
            precision="fp64", batch_size=batch_size, hyper={"learning_rate": 1e-3, "inverse_interval": 4}, **keys,
        )
        for smoothing in SMOOTHINGS
    }  # fmt: skip


Case = tuple[int | None, str, str]


class Columns(nn.Module):
    """Layers without a block, one of them uncalled, and one that is called at 18 positions of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.called, self.uncalled = nn.Conv2d(3, 3, 1, groups=3), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.called(self.depthwise(images)), self.uncalled.weight, self.uncalled.bias)


def small_trajectory(ghost: int | None, fisher: str, form: str) -> Tensor:
    """Parameters after some steps of a small network with batch norm, on however many workers there are."""
    torch.manual_seed(1)
    workers = Workers.current()
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), BatchNorm(3, ghost), nn.ReLU(), BatchNorm(3, ghost, affine=False), Columns(),
        nn.Flatten(), nn.Linear(108, 3), BatchNorm(3, ghost),
    ).double()  # fmt: skip
    network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if workers.size > 1 else model
    optimizer = KFAC(model, lr=0.01, inverse_interval=2, fisher=fisher, damping_form=form)  # type: ignore[arg-type]
    for step in range(4):
        size = 7 if step == 3 else 20  # the last one leaves workers without a ghost batch
        images, labels = torch.randn(size, 2, 8, 8, dtype=torch.float64), torch.randint(3, (size,))
        part = worker_slice(size, workers.rank, workers.size, ghost or 1)
        optimizer.zero_grad()
        with optimizer.capture(size, part):
            loss = F.cross_entropy(network(images[part]), labels[part], reduction="sum")
            (loss * workers.size / size).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def results(runs: dict[str, RunSpec], samples: int | None, cases: list[Case]) -> dict[str, Tensor]:
    """Of all runs and small networks, in one set of processes."""
    return final_parameters(runs, samples) | {str(case): small_trajectory(*case) for case in cases}


def assert_workers_agree(runs_of: dict[int, dict[str, RunSpec]], samples: int | None, cases: list[Case]) -> None:
    """Runs by the number of workers, and the small networks on each."""
    one = results({name: run for runs in runs_of.values() for name, run in runs.items()}, samples, cases)
    for size, runs in runs_of.items():
        several = run_workers(size, results, runs, samples, cases)
        for name in several:
            torch.testing.assert_close(
                several[name], one[name], rtol=0, atol=1e-9, msg=lambda m, n=name, s=size: f"{s} workers, {n}: {m}"
            )


CASES: list[Case] = [
    (None, "empirical", "pi"),
    (5, "empirical", "eigen"),
    (None, "monte_carlo", "pi"),
    (5, "monte_carlo", "pi"),
]


def test_one_worker_and_two_give_a_small_network_the_same_parameters():
    assert_workers_agree({2: {}}, 300, CASES)


@pytest.mark.long
def test_one_worker_and_several_give_the_same_parameters():
    runs = kfac_runs(300, "lenet5", 64)
    shared = kfac_runs(300, "lenet5", 64, noise={"copies": 3, "ghost": 16}, kfac={"fisher": "monte_carlo"})
    eigen = kfac_runs(300, "lenet5", 64, micro_batch_size=10, kfac={"damping_form": "eigen"})
    runs |= dict([*list(shared.items())[-1:], *list(eigen.items())[-1:]])
    # with ties of max-pooling left to rounding, the parameters of this one were 7e-3 apart
    hyper = {"learning_rate": 0.02, "damping": 0.1, "mixup_alpha": 0.4, "kl_clip": 1e-2}
    runs["ties"] = make_run(
        digits(augment=["crop"])[0], optimizer="kfac", smoothing="mixup", precision="fp64", batch_size=32,
        budget={"steps": 40}, seed=4, hyper=hyper,
    )  # fmt: skip
    assert_workers_agree({2: runs, 4: {"lenet5 mixup+noise {}": runs["lenet5 mixup+noise {}"]}}, 300, CASES)


@pytest.mark.slow
def test_one_worker_and_several_agree_on_all_digits():
    runs = kfac_runs(None, "lenet5", 128)
    assert_workers_agree({2: runs, 4: runs}, None, [])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vgg9-sync", "vgg9-ghost"])
def test_one_worker_and_several_agree_with_vgg9(model: str):
    # 72 training samples in mini-batches of 32: the last one of 8 leaves workers without samples
    runs = kfac_runs(90, model, 32)
    one = final_parameters(runs, 90)
    two = run_workers(2, final_parameters, runs, 90)  # not four: 2 GB each
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def digits_trials() -> dict[str, RunSpec]:
    """The first two trials of every K-FAC cell of the shipped study, for three epochs."""
    import optuna  # here: the workers have no use for these two

    from lbstudy.tuning.search import CellSearch

    study = load_study(find_study("digits"), {"tuning.trials": 2, "budget.epochs": 3, "precision": "fp64"})
    runs = {}
    for cell in study.list_cells():
        search = CellSearch(study, cell, optuna.storages.InMemoryStorage(), [])
        for number in range(2 * (cell.optimizer == "kfac")):
            params, _ = search.ask(number)
            runs[f"{cell.name} {number}"] = run_spec(study, cell, params, study.trial_seed(cell, number))
    return runs


@pytest.mark.slow
def test_one_worker_and_two_agree_on_the_trials_of_a_study():
    runs = digits_trials()
    one, two = (run_workers(size, final_parameters, runs, None) for size in (1, 2))
    assert len(one) == 16
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_change_nothing():
    run = kfac_runs(300, "lenet5", 64)["lenet5 mixup+noise {}"]
    result = final_parameters({"whole": run, "parts": run.model_copy(update={"micro_batch_size": 10})}, 300)
    torch.testing.assert_close(result["parts"], result["whole"], rtol=0, atol=1e-9)
