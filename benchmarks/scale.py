"""What a large study costs its driver: reading 10,000 trial records, and memory over 1,000 trials.

records   `lbstudy status` and `lbstudy best` on a made-up study of 10,000 finished trials, as commands, wall time
memory    resident memory of the driver at trial 100 and at trial 1,000 of a study of one-step trials on the digits

    uv run python benchmarks/scale.py            # about 5 minutes on two cores
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil

from lbstudy.methods.checks import load_study
from lbstudy.methods.configure import run_spec
from lbstudy.records.folder import StudyFolder, TrialRecord
from lbstudy.study.load import find_study
from lbstudy.study.spec import StudySpec
from lbstudy.training import datasets
from lbstudy.tuning import tuner

CELLS = {"cells.batch_size": [32, 256], "cells.smoothing": ["none", "mixup"]}


def many_trials(trials: int) -> StudySpec:
    """The digits study, with one-step trials sampled at random and so many of them in each of four cells."""
    cheap = {"budget": {"steps": 1}, "schedule": {"name": "constant"}, "cells.optimizer": ["sgd"]}
    search = {
        "learning_rate": {"log_uniform": [0.01, 1]},
        "mixup_alpha": {"uniform": [0.1, 1], "when": {"smoothing": "mixup"}},
    }
    tuning = {"trials": trials, "sampler": "random", "pruner": "none"}
    return load_study(find_study("digits.yaml"), {**CELLS, **cheap, "search": search, "tuning": tuning})


def write_records(path: Path, trials: int) -> None:
    """A study folder with so many finished trials."""
    study = many_trials(trials // 4)
    folder = StudyFolder.create(path, study)
    for cell in study.list_cells():
        params = dict.fromkeys(study.ranges(cell), 0.5)
        run = run_spec(study, cell, params, 0).model_dump(mode="json")
        for number in range(study.tuning.trials):
            metrics = {"epoch": 1, "step": 1, "val_accuracy": number / trials, "val_loss": 1.0, "train_loss": 1.0}
            record = TrialRecord(
                cell.name, number, cell.optimizer, cell.batch_size, cell.smoothing, params, number, run,
                status="completed", metrics=metrics,
            )  # fmt: skip
            folder.write_trial(record)


def time_command(*arguments: str) -> float:
    """Wall time of an lbstudy command; the better of two."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lbstudy", *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def measure_memory(path: Path) -> dict[int, float]:
    """MiB that the driver holds when so many trials have ended."""
    study, process, held = many_trials(260), psutil.Process(), {}
    ended = 0

    def show(record: TrialRecord) -> None:
        nonlocal ended
        ended += record.status != "running"
        if ended in (100, 1000):
            held[ended] = process.memory_info().rss / 2**20

    tuner.connect()
    plan = tuner.plan(study, datasets.load_all(study), tuner.cluster_nodes())
    tuner.tune_study(StudyFolder.create(path, plan.study), plan, show, notice=print)
    tuner.disconnect()
    return held


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="made-up trials")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {date.today()}")
    with tempfile.TemporaryDirectory(prefix="lbstudy-benchmark-") as folder:
        write_records(Path(folder) / "many", options.records)
        for command in ("status", "best"):
            print(f"{command} on {options.records} records: {time_command(command, f'{folder}/many'):.2f} s")
        held = measure_memory(Path(folder) / "memory")
    print(
        f"driver: {held[100]:.0f} MiB at trial 100, {held[1000]:.0f} MiB at trial 1,000: {held[1000] / held[100]:.2f} x"
    )


if __name__ == "__main__":
    main()
