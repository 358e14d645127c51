"""What a lane and the head of a study occupy: each process of a running study, by what Ray calls it.

A private Ray and lanes of one worker each, on images of CIFAR-10's size; measured when every lane has reported its
first epochs. Proportional set sizes add up: pages that processes share, such as torch's code, are divided among them.
The head is the driver and Ray's own servers; a lane is what there is once for each lane, its worker apart. The CPU
seconds that each has had by then say where the time of the start goes; a worker's and the driver's are not of it alone.

    uv run python benchmarks/lane_memory.py                # 2 lanes, 50,000 images; some 2 minutes on two cores
    uv run python benchmarks/lane_memory.py --lanes 4
    uv run python benchmarks/lane_memory.py --smoke        # 1 lane, digits
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

import psutil

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` Ray would start each process with another `uv run`

from lbstudy.methods.checks import load_study
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import TrialRecord
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


class Occupied(NamedTuple):
    """What the processes of a title take together."""

    processes: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0  # of CPU


def occupied() -> dict[str, Occupied]:
    """What all processes of this study take, by title."""
    found: dict[str, Occupied] = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            name, size, times = title(process), process.memory_full_info().pss / MB, process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        before = found.get(name, Occupied())
        more = (1, size, times.user + times.system)
        found[name] = Occupied(*(old + new for old, new in zip(before, more, strict=True)))
    return found


def measure(lanes: int, small: bool) -> dict[str, Occupied]:
    """Run the study; what is occupied at its fullest, when each lane trains."""
    study = one_cell_study(lanes, small)
    data = datasets.load_all(study)
    found: dict[str, Occupied] = {}
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

    heads = set(found) & set(ONCE)
    per_lane = set(found) - heads - {WORKER}
    print(f"ray {ray.__version__}; {date.today()}; {lanes} lanes; proportional set sizes, and CPU seconds")
    for name, each in sorted(found.items(), key=lambda entry: -entry[1].megabytes):
        place = "head" if name in heads else "lane" if name in per_lane else "worker"
        count, megabytes, seconds = each
        print(f"{place:7} {name:28} {count:2} x {megabytes / count:6.0f} MB {seconds / count:7.1f} s")
    beside = sum(found[name].megabytes for name in per_lane) / lanes
    print(f"a lane beside its worker: {beside:.0f} MB; a worker: {found[WORKER].megabytes / lanes:.0f} MB")
    print(f"the head: {sum(found[name].megabytes for name in heads):.0f} MB")


if __name__ == "__main__":
    main()
