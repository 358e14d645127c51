"""What a lane and the head of a study occupy: each process of a running study, by what Ray calls it.

A private Ray and lanes of one worker each, on images of CIFAR-10's size; measured when every lane has reported its
first epochs. Proportional set sizes add up: pages that processes share, such as torch's code, are divided among them.
The head is the driver and Ray's own servers; a lane is what there is once for each lane, its worker apart.

    uv run python benchmarks/lane_memory.py                # 2 lanes, 50,000 images; some 2 minutes on two cores
    uv run python benchmarks/lane_memory.py --lanes 4
    uv run python benchmarks/lane_memory.py --smoke        # 1 lane, digits
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

import psutil

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` Ray would start each process with another `uv run`

from lbstudy.methods.checks import load_study
from lbstudy.records.folder import StudyFolder, TrialRecord
from lbstudy.study.load import find_study
from lbstudy.study.spec import StudySpec
from lbstudy.training import datasets
from lbstudy.tuning import tuner

import ray  # isort: skip  # after lbstudy, which sets Ray's environment

WORKER = "RayTrainWorker"
ONCE = ("driver", "gcs_server", "raylet", "dashboard", "monitor", "DashboardAgent", "RuntimeEnvAgent", "IDLE", "python",
        "_AutoscalingCoordinatorActor")  # fmt: skip
"""What there is once, or is not of a lane."""

MB = 2**20


def one_cell_study(lanes: int, small: bool) -> StudySpec:
    """LeNet-5, one cell, three epochs a trial, a trial for each lane."""
    data = {"name": "digits"} if small else {"name": "synthetic", "samples": 50_000}
    return load_study(
        find_study("digits.yaml"),
        {
            "dataset": {**data, "validation_size": 0.1, "augment": ["crop", "flip"]},
            "budget": {"epochs": 3},
            "schedule": {"name": "constant"},
            "cells.optimizer": ["sgd"],
            "cells.batch_size": [128],
            "cells.smoothing": ["none"],
            "search": {"learning_rate": {"log_uniform": [0.01, 0.1]}},
            "tuning": {"trials": lanes, "sampler": "random", "pruner": "none"},
            "resources": {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "lanes": lanes},
        },
    )


def title(process: psutil.Process) -> str:
    """What a process is: the actor's class, the server's name, or `driver`."""
    if process.pid == os.getpid():
        return "driver"
    command = process.cmdline()
    first = command[0] if command else process.name()
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    return next((name for name in ONCE if any(name in part for part in command[:4])), process.name())


def occupied() -> Counter[str]:
    """Megabytes of all processes of this study, by title; `title 2` and so on for further ones of a title."""
    found: Counter[str] = Counter()
    count: Counter[str] = Counter()
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            name, size = title(process), process.memory_full_info().pss / MB
        except psutil.NoSuchProcess:
            continue
        count[name] += 1
        found[f"{name} {count[name]}"] = size
    return found


def measure(lanes: int, small: bool) -> Counter[str]:
    """Run the study; what is occupied at its fullest, when each lane trains."""
    study = one_cell_study(lanes, small)
    data = datasets.load_all(study)
    found: Counter[str] = Counter()
    at_work: set[int] = set()

    def show(record: TrialRecord) -> None:
        nonlocal found
        if record.epochs >= 2:
            at_work.add(record.number)
        if len(at_work) == lanes and not found:
            found = occupied()

    with tempfile.TemporaryDirectory(prefix="lbstudy-benchmark-") as storage:
        plan = tuner.plan(study, data, [{"CPU": float(lanes)}])
        tuner.tune_study(StudyFolder.create(Path(storage) / "study", plan.study), plan, show, notice=print)
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=2, help="at a time; as many CPUs are taken (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="see that it works: 1 lane, digits")
    options = parser.parse_args()
    lanes = 1 if options.smoke else options.lanes

    tuner.connect()
    found = measure(lanes, options.smoke)
    tuner.disconnect()

    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, size in found.items():
        total[name.rpartition(" ")[0]] += size
        count[name.rpartition(" ")[0]] += 1
    heads = set(total) & set(ONCE)
    print(f"ray {ray.__version__}; {date.today()}; {lanes} lanes; proportional set sizes, MB")
    for name, size in total.most_common():
        place = "head" if name in heads else "worker" if name == WORKER else "lane"
        print(f"{place:7} {name:28} {count[name]:2} x {size / count[name]:6.0f}")
    per_lane = sum(size for name, size in total.items() if name not in heads and name != WORKER) / lanes
    print(f"a lane beside its worker: {per_lane:.0f} MB; a worker: {total[WORKER] / lanes:.0f} MB")
    print(f"the head: {sum(total[name] for name in heads):.0f} MB")


if __name__ == "__main__":
    main()
