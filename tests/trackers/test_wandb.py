"""Weights & Biases' offline files, read back with its own messages: its package has no reader in Python."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lbstudy.trackers.sync import Sync
from tests.trackers.made_up import add_trial, make_mixed

pytest.importorskip("wandb", reason="the extra `wandb` is not installed")

from wandb.proto.wandb_internal_pb2 import Record

from lbstudy.trackers.wandb import WeightsAndBiases

BLOCK, HEADER = 1 << 15, 7
WHOLE, LAST = 1, 4


def records(path: Path) -> list[Record]:
    """The messages of a file, which is a log as LevelDB writes them, after seven bytes of W&B's own."""
    content, position, message, found = path.read_bytes(), HEADER, b"", []
    assert content.startswith(b":W&B")
    while position + HEADER <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += HEADER + length
        message += content[position - length : position]
        if kind in (WHOLE, LAST):
            found.append(Record.FromString(message))
            message = b""
    return found


def of_kind(found: list[Record], kind: str) -> list:
    return [getattr(entry, kind) for entry in found if entry.WhichOneof("record_type") == kind]


def items(message) -> dict[str, object]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in message}


def runs(path: Path) -> dict[str, Path]:
    return {str(run.parent.parent.relative_to(path)): run for run in path.glob("*/*/*/offline-run-*/run-*.wandb")}


@pytest.mark.slow  # a process for each run: half a minute on busy cores
def test_runs_are_whole_and_made_once(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    add_trial(folder, 4, 1000)  # of more than one block
    hooks = sys.exit, sys.excepthook
    Sync(folder, WeightsAndBiases(folder)).once()
    assert (sys.exit, sys.excepthook) == hooks  # W&B wraps them with every run; a thousand wraps cannot be called
    root = tmp_path / "s" / "trackers" / "wandb"
    found = runs(root)
    ended = ["trials/sgd-b32-none/0000", "trials/sgd-b32-none/0001", "trials/sgd-b32-none/0002"]
    assert sorted(found) == ["confirm/sgd-b32-none/0000", *ended, "trials/sgd-b32-none/0004"]

    written = records(found["trials/sgd-b32-none/0002"])
    (run,) = of_kind(written, "run")
    assert (run.project, run.run_group, run.job_type) == ("tiny", "sgd-b32-none", "trials")
    assert (run.display_name, list(run.tags)) == ("trials/sgd-b32-none/0002", ["diverged"])
    values = items(run.config.update)
    assert values["learning_rate"] == 2.1
    assert values["batch_size"] == 32
    (point,) = [items(entry.item) for entry in of_kind(written, "history")]
    assert (point["epoch"], point["val_loss"], point["_step"]) == (1, 3.0, 1)
    assert [entry.exit_code for entry in of_kind(written, "exit")] == [1]
    summaries = [items(entry.update) for entry in of_kind(written, "summary")]
    assert {"status": "diverged"}.items() <= {k: v for entry in summaries for k, v in entry.items()}.items()

    long = records(found["trials/sgd-b32-none/0004"])
    assert [items(entry.item)["_step"] for entry in of_kind(long, "history")] == list(range(1, 1001))
    assert [entry.exit_code for entry in of_kind(long, "exit")] == [0]

    before = {path: path.stat().st_mtime_ns for path in found.values()}
    Sync(folder, WeightsAndBiases(folder)).once()
    assert {path: path.stat().st_mtime_ns for path in runs(root).values()} == before
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *(str(run.parent) for run in found.values())],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert all(run.name in listed.stdout + listed.stderr for run in found.values())
