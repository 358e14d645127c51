"""The fixed cost of a trial: from the end of one trial to the first optimisation step of the next, one worker.

warm lane     `lbstudy.tuning.lane.Lane`: one worker group that is fed trial after trial
through Tune  the same inside a whole study, one lane: Tune, Optuna and the records included
TorchTrainer  a new `ray.train.torch.TorchTrainer` for every trial, as Ray's guides show it

All train the same run: LeNet-5 on the digits, a budget of one optimisation step, so that a trial ends with its
first step and the time from one trial's end to the next one's is what we look for, validation included. The
TorchTrainer's times are taken in its worker, between like events; the lane's in the driver, when the last report of
a trial arrives, and Tune's when a trial's record is complete: both count the way back as well. Printed are medians;
what the first trial of each has to wait for (processes, imports) is shown apart.

    uv run python benchmarks/trial_start.py            # about 4 minutes on two cores
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` Ray would start each process with another `uv run`

from benchmarks import _measuring as measuring
from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
from lbstudy.study.code import Code
from lbstudy.study.load import find_study
from lbstudy.study.spec import Resources, StudySpec
from lbstudy.training import datasets
from lbstudy.tuning import tuner
from lbstudy.tuning.lane import Job, Lane

import ray  # isort: skip  # after lbstudy, which sets Ray's environment

RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)


def one_step_study(trials: int) -> StudySpec:
    """LeNet-5 on the digits, one cell, one step a trial."""
    return load_study(
        find_study("digits.yaml"),
        {
            "budget": {"steps": 1},
            "schedule": {"name": "constant"},
            "cells.optimizer": ["sgd"],
            "cells.batch_size": [32],
            "cells.smoothing": ["none"],
            "search": {"learning_rate": {"log_uniform": [0.01, 1]}},
            "tuning": {"trials": trials, "sampler": "tpe", "startup_trials": 4, "pruner": "none"},
            "resources": RESOURCES.model_dump(),
        },
    )


def one_step_runs(trials: int) -> list[dict[str, Any]]:
    """The runs of that study, each with a seed of its own."""
    study = one_step_study(trials)
    cell = study.list_cells()[0]
    seeds = [study.trial_seed(cell, number) for number in range(trials)]
    return [run_spec(study, cell, {"learning_rate": 0.1}, seed).model_dump(mode="json") for seed in seeds]


def time_lane(trials: int, dataset: ray.ObjectRef, storage: str) -> list[float]:
    """When each trial in a lane ended, as the driver learns it; the first is the lane's start."""
    times = [time.time()]
    data = {datasets.source(one_step_study(1).dataset): dataset}
    lane = Lane(RESOURCES, data, ray.put(Code()), storage, name="benchmark")
    for number, run in enumerate(one_step_runs(trials)):
        lane.begin(Job(str(number), run, rungs=[]))
        lane.come_up()
        report = lane.next_report()
        times.append(time.time())
        assert report["outcome"] == "completed", report
    lane.end()
    return times


def time_tune(trials: int, data: datasets.Datasets, storage: str) -> list[float]:
    """When each trial of a study on one lane was complete; the first is the study's start."""
    study = one_step_study(trials)
    plan = dataclasses.replace(tuner.plan(study, data, tuner.cluster_nodes()), lanes=1)
    times = [time.time()]

    def show(record: TrialRecord) -> None:
        if record.status != "running":
            assert record.status == "completed", record.error
            times.append(time.time())

    tuner.tune_study(StudyFolder.create(Path(storage) / "study", plan.study), plan, show, notice=print)
    assert len(times) == trials + 1
    return times


def time_torch_trainer(trials: int, dataset: ray.ObjectRef, storage: str) -> list[float]:
    """When each trial ended in the worker of its own TorchTrainer; the first is the first one's start."""
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def train_loop(config: dict[str, Any]) -> None:
        from lbstudy.study.run import RunSpec
        from lbstudy.training.data import place
        from lbstudy.training.train import train

        run = RunSpec.model_validate(config["run"])
        outcome = train(run, place(ray.get(config["dataset"][0]), run.dataset, run.split_seed))
        assert outcome.last.step == 1
        Path(config["ended"]).write_text(repr(time.time()))

    times = [time.time()]
    for number, run in enumerate(one_step_runs(trials)):
        ended = Path(storage) / f"ended-{number}"
        TorchTrainer(
            train_loop,
            train_loop_config={"run": run, "dataset": [dataset], "ended": str(ended)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name=f"trial-{number}", storage_path=storage, logging_config=LoggingConfig(log_level="ERROR")
            ),
        ).fit()
        times.append(float(ended.read_text()))
    return times


def intervals(times: Iterable[float]) -> list[float]:
    """Seconds from each trial's end to the next one's; first the seconds from the start to the first one's."""
    return [later - earlier for earlier, later in pairwise(times)]


def main() -> None:
    """Measure and print."""
    options = measuring.parser(__doc__, threads=None).parse_args()
    warm, cold = (2, 2) if options.smoke else (50, 6)
    measuring.begin(options, f"ray {ray.__version__}")
    tuner.connect()
    images = datasets.load_all(one_step_study(1))
    dataset = ray.put(next(iter(images.values())))
    with tempfile.TemporaryDirectory(prefix="lbstudy-benchmark-") as storage:
        waits = {
            "warm lane": intervals(time_lane(warm, dataset, storage)),
            "through Tune": intervals(time_tune(warm, images, storage)),
            "TorchTrainer": intervals(time_torch_trainer(cold, dataset, storage)),
        }
    tuner.disconnect()

    reference = median(waits["TorchTrainer"][1:])
    for name, (first, *others) in waits.items():
        measuring.show(f"{name}: the first trial", first, "s until it ends")
        shown = f"{median(others):.3f} ({min(others):.3f} to {max(others):.3f}, n = {len(others)})"
        measuring.show(f"{name}: from the end of a trial to the first step of the next", shown, "s")
        if name != "TorchTrainer":
            measuring.show(f"{name}", reference / median(others), "times sooner", "TorchTrainer")


if __name__ == "__main__":
    main()
