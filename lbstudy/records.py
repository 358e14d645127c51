"""What a study leaves on disk; the only code that reads and writes it.

    STUDY/study.yaml                 the resolved study
    STUDY/environment.json           versions, commit and machine
    STUDY/optuna.journal             one Optuna study per cell, for optuna-dashboard
    STUDY/trials/CELL/0007/trial.json    configuration, status, last metrics (written atomically)
    STUDY/trials/CELL/0007/epochs.jsonl  one line of metrics per epoch

A trial is its cell and number. This module imports neither torch nor ray.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lbstudy.study import StudyError, StudySpec, load_study

Status = Literal["running", "completed", "pruned", "diverged", "failed"]
FINISHED: tuple[Status, ...] = ("completed", "pruned", "diverged", "failed")
PACKAGES = ["lbstudy", "ray", "torch", "torchvision", "optuna", "numpy", "pandas"]


@dataclass
class TrialRecord:
    """One trial: what was run, how it ended, and its last epoch's metrics."""

    cell: str
    number: int  # counted from 0 within the cell
    optimizer: str
    batch_size: int
    smoothing: str
    params: dict[str, float]  # the tuned values
    seed: int
    run: dict[str, Any]  # the whole RunSpec: with it anyone can repeat the trial
    published: bool = False  # a configuration from the literature, not the sampler's
    status: Status = "running"
    started: str = ""  # ISO 8601, UTC
    seconds: float = 0.0  # training and validation, without waiting
    device: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)  # the last epoch's report
    fingerprint: str = ""  # of the final model
    error: str = ""  # traceback of a failed trial

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return int(self.metrics.get("epoch", 0))


class StudyFolder:
    """A study's folder."""

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def check(path: Path) -> None:
        """Make sure that a study can begin here; leaves nothing behind.

        Raises:
            StudyError: the folder holds something already, or cannot be written.
        """
        try:
            if path.exists() and any(path.iterdir()):
                raise StudyError(f"{path} is not empty; choose another --storage or --name, or remove it")
            above = next(folder for folder in (path, *path.parents) if folder.exists())
            with tempfile.TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise StudyError(f"{path}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def create(cls, path: Path, study: StudySpec) -> StudyFolder:
        """Begin a study in a new or empty folder.

        Raises:
            StudyError: the folder holds something already, or cannot be written.
        """
        cls.check(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            _write(path / "study.yaml", study.to_yaml())
            _write(path / "environment.json", json.dumps(environment(), indent=2))
        except OSError as error:
            raise StudyError(f"{path}: cannot be written: {error.strerror or error}") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """An existing study.

        Raises:
            StudyError: the folder holds no study.
        """
        if not (path / "study.yaml").is_file():
            raise StudyError(f"{path}: no study here; a study's folder holds a study.yaml")
        return cls(path)

    def study(self) -> StudySpec:
        """The study as it was resolved when it began."""
        return load_study(self.path / "study.yaml")

    @property
    def journal(self) -> Path:
        """Optuna's journal of all cells."""
        return self.path / "optuna.journal"

    def write_trial(self, record: TrialRecord) -> None:
        """Write or replace a trial's record in one step."""
        folder = self._trial_folder(record)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "trial.json", json.dumps(asdict(record)))

    def append_epoch(self, record: TrialRecord, report: dict[str, Any]) -> None:
        """Add an epoch's metrics to a trial's series."""
        with (self._trial_folder(record) / "epochs.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(report) + "\n")

    def trials(self) -> list[TrialRecord]:
        """All trials, by cell and number."""
        return [TrialRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in self._trial_files()]

    def epochs(self, record: TrialRecord) -> list[dict[str, Any]]:
        """A trial's metrics, an entry per epoch."""
        path = self._trial_folder(record) / "epochs.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _trial_files(self) -> Iterator[Path]:
        yield from sorted((self.path / "trials").glob("*/*/trial.json"))

    def _trial_folder(self, record: TrialRecord) -> Path:
        return self.path / "trials" / record.cell / f"{record.number:04d}"


def utc_now() -> str:
    """The present time, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def environment() -> dict[str, Any]:
    """Versions, commit and machine: what else a result may depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": utc_now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
    }


def _commit() -> str | None:
    """The commit of the source tree that runs, marked where it has uncommitted changes; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(out.name, path)
