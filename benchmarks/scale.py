"""How far one driver and one reader carry: lanes and reports a second, and studies of up to 100,000 trials.

read      `status`, `best` and `report` of made-up studies with a series of five epochs a trial, and what a driver does
          before it goes on with such a study (`resume`): CPU time, without and with what it takes to start, and the
          most memory; and the bare scan of the records
search    a suggestion of the sampler with so many trials in its cell, and Optuna's journal rebuilt from the records
drive     the driver's loop with everything that is its own (Tune, search, pruner, records) and lanes that report at
          once: CPU time a report, and reports a second; on the local disk, and on a made-up object store that takes
          30 ms a request; and how the driver's memory grows. All lanes are in one process, so that 256 fit a machine

    uv run python benchmarks/scale.py                             # 100,000 trials take long to write
    uv run python benchmarks/scale.py read --trials 1000 10000    # a part of it
    uv run python benchmarks/scale.py --smoke                     # all parts, tiny: does it run?

Each line is a name, a value and a unit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

import numpy as np
import psutil
import ray
from pyarrow import fs
from ray import tune
from ray.air.execution.resources.placement_group import PlacementGroupAcquiredResources

from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.storage import ObjectPath, StoragePath
from lbstudy.study.load import find_study
from lbstudy.study.spec import StudySpec

PARTS = ("read", "search", "drive")
COMMANDS = ("status", "best", "report", "resume")
EPOCHS = 5
REQUEST_SECONDS = 0.03
COST = "print(time.process_time(), *[x.split()[1] for x in open('/proc/self/status') if 'VmHWM' in x])"
MODEL = bytes(250_000)  # of LeNet-5


def tell(name: str, value: float, unit: str) -> None:
    """Print a figure."""
    print(f"{name:<56} {value:>10.4g} {unit}", flush=True)


def many_trials(trials: int, sampler: str = "tpe", epochs: int = EPOCHS, pruner: str = "asha") -> StudySpec:
    """The digits study with so many trials in each of four cells."""
    changes = {
        "cells": {"optimizer": ["sgd"], "batch_size": [32, 256], "smoothing": ["none", "mixup"]},
        "budget": {"epochs": epochs},
        "schedule": {"name": "constant"},
        "search": {
            "learning_rate": {"log_uniform": [0.01, 1]},
            "momentum": {"uniform": [0.0, 0.99]},
            "mixup_alpha": {"uniform": [0.1, 1], "when": {"smoothing": "mixup"}},
        },
        "tuning": {"trials": trials, "sampler": sampler, "pruner": {"name": "asha"} if pruner == "asha" else pruner},
    }
    return load_study(find_study("digits.yaml"), changes)


def epoch_report(epoch: int, value: float) -> dict[str, float]:
    """What a run says of an epoch."""
    return {
        "epoch": epoch, "step": 45 * epoch, "images": 1437 * epoch, "seconds": 1.5, "run_seconds": 1.5 * epoch,
        "images_per_second": 958.0, "train_loss": 2.3 - value, "val_loss": 2.3 - value, "val_accuracy": value,
        "learning_rate": 0.1, "gradient_norm": 1.0,
    }  # fmt: skip


def write_records(path: Path, trials: int, sampler: str = "tpe") -> StudySpec:
    """A study's folder with so many finished trials."""
    study, random = many_trials(trials // 4, sampler), np.random.default_rng(0)
    folder = StudyFolder.create(path, study)
    with patch.object(os, "fsync", lambda file: None):  # 200,000 of them would take hours
        for cell in study.list_cells():
            ranges = study.ranges(cell)
            run = run_spec(study, cell, dict.fromkeys(ranges, 0.5), 0).model_dump(mode="json")
            for number in range(study.tuning.trials):
                params = {name: entry.bounds[0] + random.random() * 0.09 for name, entry in ranges.items()}
                accuracies = np.maximum.accumulate(random.random(EPOCHS)).tolist()
                series = [epoch_report(epoch, value) for epoch, value in enumerate(accuracies, start=1)]
                record = TrialRecord(
                    cell.name, number, cell.optimizer, cell.batch_size, cell.smoothing, params, number, run,
                    status="completed", started="2026-11-26T00:00:00.000+00:00", seconds=1.5 * EPOCHS, device="cpu",
                    workers=[1], nodes=["node"], metrics=series[-1],
                )  # fmt: skip
                folder.write_trial(record)
                lines = "".join(json.dumps(entry) + "\n" for entry in series)
                (Path(str(folder.trial_folder(record))) / "epochs.jsonl").write_text(lines)
    return study


def cost_of(part: str, path: Path) -> tuple[float, float]:
    """CPU seconds of a command, or of `resume`, in a process of its own, and the most memory it has held, in MiB."""
    work = "from scale import resume as work" if part == "resume" else "from lbstudy.console.cli import app as work"
    call = "work(Path(path))" if part == "resume" else "work([part, path], standalone_mode=False)"
    code = f"import sys, time; from pathlib import Path; _, part, path = sys.argv; {work}; {call}; {COST}"
    told = subprocess.run(
        [sys.executable, "-c", code, part, str(path)],
        check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    used, held = told.stdout.split()[-2:]
    return float(used), float(held) / 1024


def resume(path: Path) -> None:
    """What a driver does before it goes on with a study, Ray left out."""
    from lbstudy.tuning import tuner

    folder = StudyFolder.open(str(path))
    study = folder.study()
    epochs = {cell.name: EPOCHS for cell in study.list_cells()}
    with patch.object(tuner, "fit_runs", lambda *arguments: None):
        tuner.tune_study(folder, tuner.Plan(study, {}, epochs, 1, 1), lambda record: None, print)


def scan(path: Path) -> float:
    """Trials a second of CPU time at which a study's records and series are read."""
    folder, began, count = StudyFolder.open(str(path)), time.process_time(), 0
    for count, record in enumerate(folder.trials(), start=1):  # noqa: B007
        folder.epochs(record)
    return count / (time.process_time() - began)


def measure_reading(sizes: list[int], commands: list[str]) -> None:
    """What it costs to look at studies, and to take one up."""
    base: dict[str, float] = {}
    for trials in (4, *sizes):
        with tempfile.TemporaryDirectory(prefix="lbstudy-benchmark-") as scratch:
            path = Path(scratch) / "many"
            write_records(path, trials)
            if trials > 4:
                tell(f"scan of {trials} trials", scan(path), "trials/s of CPU")
            for command in commands:
                used, held = cost_of(command, path)
                base.setdefault(command, used)
                tell(f"{command}, {trials} trials", used, "s of CPU")
                tell(f"{command}, {trials} trials, most memory", held, "MiB")
                if trials > 4:
                    tell(f"{command}, {trials} trials, each", 1000 * (used - base[command]) / trials, "ms of CPU")


def measure_search(sizes: list[int]) -> None:
    """A suggestion of TPE, and the rebuilt journal, with so many trials in a cell."""
    from optuna.storages import InMemoryStorage

    from lbstudy.tuning.search import CellSearch, Past

    for trials in sizes:
        study, random = many_trials(trials + 20), np.random.default_rng(0)
        cell = study.list_cells()[1]
        past = []
        for number in range(trials):
            params = {name: entry.bounds[0] + random.random() * 0.9 for name, entry in study.ranges(cell).items()}
            past.append(Past(cell, number, params, "completed", tuple(random.random(EPOCHS))))
        began = time.process_time()
        search = CellSearch(study, cell, InMemoryStorage(), past)
        tell(f"rebuild of a search, {trials} trials a cell, each", 1000 * since(began) / trials, "ms of CPU")
        began = time.process_time()
        for number in range(trials, trials + 20):
            search.ask(number)
            search.report(number, 1, 0.5)
            search.tell(number, "completed", 0.5)
        tell(f"suggestion of TPE, {trials} trials a cell", 1000 * since(began) / 20, "ms of CPU")


def since(began: float) -> float:
    """Seconds of CPU time."""
    return time.process_time() - began


class MadeUpLane(tune.Trainable):
    """In the place of `tuner.TrialActor`: a lane whose epochs take no time."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self._epoch, self._epochs = -1, new_config["run"]["budget"]["epochs"]
        self._random = np.random.default_rng(new_config["number"])
        return True

    def step(self) -> dict[str, Any]:
        """What a lane tells."""
        self._epoch += 1
        if not self._epoch:
            return {"nodes": ["node"]}
        report = epoch_report(self._epoch, float(self._random.random()))
        machine = {"device": "cpu", "workers": 1, "memory": 0, "device_memory": 0}
        result = {"report": report, "epoch": self._epoch, "objective": report["val_accuracy"], **machine}
        if self._epoch < self._epochs:
            return result | {"done": False}
        return result | {"done": True, "outcome": "completed", "model": [ray.put(MODEL)]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


class House:
    """All lanes, in one process."""

    def __init__(self) -> None:
        self._lanes: dict[int, MadeUpLane] = {}

    def call(self, number: int, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What Tune asks of the actor of a lane."""
        if name == "begin":
            self._lanes[number] = MadeUpLane(**options)
            return None
        if name.startswith("__ray"):  # whether it is there, and that it shall end
            return None
        return getattr(self._lanes[number], name)(*arguments, **options)


class Door:
    """A lane of the house, as Tune sees it: an actor's handle."""

    def __init__(self, house: Any, number: int):
        self._call = lambda name: SimpleNamespace(remote=lambda *a, **k: house.call.remote(number, name, a, k))

    def __getattr__(self, name: str) -> Any:
        return self._call(name)


class SlowStore:
    """A folder as an object store of which each request takes its time."""

    def __init__(self) -> None:
        self._store = fs.LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        def request(key: str, *arguments: Any) -> Any:
            time.sleep(REQUEST_SECONDS)
            if name == "open_output_stream":
                self._store.create_dir(key.rpartition("/")[0], recursive=True)
            return getattr(self._store, name)(key, *arguments)

        return request


def drive(lanes: int, trials: int, where: StoragePath, watch: Callable[[int], None]) -> None:
    """Run a study in so many made-up lanes; prints what a report has cost the driver, and how many came a second.

    Args:
        lanes: trials at the same time.
        trials: of each of the four cells.
        where: the study's folder.
        watch: is told how many trials have ended.
    """
    from lbstudy.training import datasets
    from lbstudy.tuning import tuner

    study = many_trials(trials, epochs=10, pruner="none")
    house, numbers, marks = ray.remote(num_cpus=0)(House).remote(), count(), list[tuple[float, float]]()
    ended = 0

    def open_lane(**options: Any) -> Door:
        number = next(numbers)
        house.call.remote(number, "begin", (), options)
        return Door(house, number)

    def show(record: TrialRecord) -> None:
        nonlocal ended
        if record.metrics:
            marks.append((time.process_time(), time.perf_counter()))
        if record.status in FINISHED:
            ended += 1
            watch(ended)

    doors = SimpleNamespace(remote=open_lane)
    machines = [{"CPU": float(lanes), "node:__internal_head__": 1.0}]
    with ExitStack() as changes:
        changes.enter_context(patch.object(tuner, "TrialActor", MadeUpLane))
        changes.enter_context(patch.object(tuner, "cluster_nodes", lambda *arguments, **options: machines))
        changes.enter_context(
            patch.object(PlacementGroupAcquiredResources, "annotate_remote_entities", lambda self, entities: [doors])
        )
        plan = tuner.plan(study, datasets.load_all(study), machines)
        tuner.tune_study(StudyFolder.create(where, plan.study), plan, show, notice=print)
    ray.kill(house)
    (cpu, wall), (cpu_then, wall_then) = marks[-1], marks[0]
    name = f"{lanes} lanes, {'S3 of 30 ms' if isinstance(where, ObjectPath) else 'local disk'}"
    tell(f"driver, {name}: a report, a trial being ten", 1000 * (cpu - cpu_then) / len(marks), "ms of CPU")
    tell(f"driver, {name}", len(marks) / (wall - wall_then), "reports/s")


def measure_driving(lanes: list[int], trials: int) -> None:
    """What one driver carries, and how it grows."""
    from lbstudy.tuning import tuner

    held: dict[int, float] = {}
    process = psutil.Process()

    def watch(ended: int) -> None:
        if ended % 100 == 0:
            held[ended] = process.memory_info().rss / 2**20

    tuner.connect()
    for number in lanes:
        with tempfile.TemporaryDirectory(prefix="lbstudy-benchmark-") as folder:
            of_each = max(trials, number // 2)  # of four cells: two trials a lane
            held.clear()
            drive(number, of_each, Path(folder) / "local", watch)
            if len(held) > 1:
                first, last = min(held), max(held)
                growth = (held[last] - held[first]) / (last - first)
                tell(f"driver, {number} lanes, from trial {first} to {last}", growth, "MiB a trial")
            drive(number, of_each, ObjectPath("s3://made-up", "", f"{folder}/s3", SlowStore()), lambda ended: None)
    tuner.disconnect()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000, 100_000], help="read: of each study")
    parser.add_argument("--cell", type=int, nargs="+", default=[100, 1000, 2000, 5000], help="search: in a cell")
    parser.add_argument("--lanes", type=int, nargs="+", default=[8, 64, 256], help="drive")
    parser.add_argument("--driven", type=int, default=100, help="drive: trials of each of four cells, at least")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS, help="read: only these")
    parser.add_argument("--smoke", action="store_true", help="everything tiny: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.trials, options.cell, options.lanes, options.driven = [20], [20], [2], 2
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)}; allowed are {', '.join(PARTS)}")
    parts = options.parts or PARTS
    print(f"{os.cpu_count()} CPU cores, {date.today()}")
    if "read" in parts:
        measure_reading(options.trials, options.commands)
    if "search" in parts:
        measure_search(options.cell)
    if "drive" in parts:
        measure_driving(options.lanes, options.driven)


if __name__ == "__main__":
    main()
