"""Images that stay in a mapped file or come to the device a mini-batch at a time: the same bits as those that lie there.

A device that is not the host's memory is made up: on a CPU `Images.afar` is what turns the staging on.
"""

import pickle
import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lbstudy.parallel.machine import machine_memory
from lbstudy.study.file import StudyError
from lbstudy.study.run import Budget, DatasetSpec, GhostBatchNorm, ModelSpec, RunSpec
from lbstudy.training import data, datasets, residency
from lbstudy.training.dataset import Dataset
from lbstudy.training.mapped import Mapped, open_mapped
from lbstudy.training.staging import one_ahead
from lbstudy.training.train import Snapshot, train
from tests.conftest import tiny_study
from tests.parallel import run_workers

SPEC = DatasetSpec(name="synthetic", samples=150, validation_size=20, augment=("crop", "flip", "cutout"))


def run_spec(**changes: Any) -> RunSpec:
    numbers = {"learning_rate": 0.02, "momentum": 0.9, "mixup_alpha": 0.4, "sam_radius": 0.05}
    run = {
        "model": ModelSpec(name="lenet5"),
        "dataset": SPEC,
        "batch_size": 32,
        "optimizer": "sgd",
        "smoothing": "none",
        "hyper": {"learning_rate": 0.02},
        "budget": Budget(epochs=2),
        "evaluate": "all",
    } | changes
    run["hyper"] |= {key: numbers[key] for method, key in METHODS.items() if method in run["smoothing"]}
    return RunSpec(**run)


METHODS = {"mixup": "mixup_alpha", "sam": "sam_radius"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mapped(spec: DatasetSpec = SPEC) -> Dataset:
    return datasets.load(spec).settled("host")


def result(run: RunSpec, dataset: Dataset, staged: bool, resume: Snapshot | None = None) -> tuple[str, list[float]]:
    """A run's fingerprint, and the losses of its evaluations."""
    before = data.Images.afar
    if staged:
        data.Images.afar = True
    try:
        outcome = train(run, data.place(dataset, run.dataset, 0), resume=resume)
    finally:
        data.Images.afar = before
    last = outcome.last
    return outcome.fingerprint, [last.train_loss, last.val_loss, last.clean_train_loss or 0, last.test_loss or 0]


VARIANTS = {
    "plain": {},
    "mixup, micro-batches": {"smoothing": "mixup", "micro_batch_size": 10},
    "sam": {"smoothing": "sam"},
    "cut short": {"budget": Budget(steps=7)},
    "batch norm": {"model": ModelSpec(name="resnet8"), "batch_norm": GhostBatchNorm(ghost=16), "evaluate_every": 2},
    "all": {"train_on": "all", "precision": "fp64"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_runs_are_equal_to_the_bit(home: Path, changes: dict[str, Any]):
    run = run_spec(**changes)
    resident = result(run, datasets.load(SPEC), staged=False)
    assert result(run, mapped(), staged=False) == resident
    assert result(run, mapped(), staged=True) == resident


@pytest.mark.long
def test_several_workers_are_equal_to_the_bit(home: Path):
    run = run_spec(smoothing="mixup", batch_size=31)
    resident = run_workers(2, result, run, datasets.load(SPEC), False)
    assert run_workers(2, result, run, mapped(), True) == resident


def test_a_run_goes_on_with_images_elsewhere(home: Path):
    run, kept = run_spec(), list[Snapshot]()
    placed = data.place(datasets.load(SPEC), SPEC, 0)
    whole = train(run, placed, on_epoch=lambda report, snapshot: kept.append(deepcopy(snapshot())) or False)
    assert result(run, mapped(), True, kept[0])[0] == whole.fingerprint


def test_the_next_images_are_on_their_way_while_the_caller_works():
    pixels = torch.arange(5 * 3, dtype=torch.uint8).view(5, 3)
    asked: list[int] = []

    def parts() -> Iterator[torch.Tensor]:
        for row in range(4):
            asked.append(row)
            yield torch.tensor([row, 4 - row])

    coming = one_ahead(pixels, parts(), torch.device("cpu"))
    for row in range(4):
        assert torch.equal(next(coming), pixels[[row, 4 - row]])
        assert asked == list(range(min(row + 2, 4)))
    assert list(coming) == []


def test_a_mapped_data_set_travels_as_a_place(home: Path):
    given, found = datasets.load(SPEC), mapped()
    assert given.settled("device") is given
    text = pickle.dumps(found)
    assert len(text) < given.nbytes / 10
    arrived = pickle.loads(text)
    for name in ("train_images", "train_labels", "test_images", "test_labels", "channel_sums"):
        np.testing.assert_array_equal(getattr(arrived, name), getattr(given, name))
    assert arrived.identity == given.identity
    place = Mapped.of(arrived.test_images)
    assert place is not None
    assert Path(place.file).parent == home / ".cache/lbstudy/decoded"
    again = mapped()
    assert Mapped.of(again.train_images) == Mapped.of(found.train_images)


def test_images_in_a_file_are_looked_at_once(home: Path):
    passes: list[tuple[int, str]] = []

    def track(images: Iterable[Any], count: int, doing: str) -> Iterable[Any]:
        passes.append((count, doing))
        return images

    def looked_at() -> Dataset:
        found = mapped()
        found.look(track)
        found.look(track)
        return found

    first, (kept,) = looked_at(), (home / ".cache/lbstudy/decoded").glob("*.seen.npz")
    assert passes == [(len(first.train_labels) + len(first.test_labels), "looking at the images, once")]
    again = looked_at()
    assert len(passes) == 1
    assert again.identity == first.identity == datasets.load(SPEC).identity
    np.testing.assert_array_equal(again.digests, first.digests)
    for damage in (b"", b"PK", kept.read_bytes()[:-40]):
        kept.write_bytes(damage)
        assert looked_at().identity == first.identity
    assert len(passes) == 4


def test_a_node_without_the_file_says_so(home: Path):
    text = pickle.dumps(found := mapped())
    place = Mapped.of(found.train_images)
    assert place is not None
    Path(place.file).unlink()
    with pytest.raises(StudyError, match=f"dataset.residency: .* {place.file} is not on .*; all nodes must see it"):
        pickle.loads(text)


def test_without_room_for_the_file_it_is_an_error(home: Path):
    (home / ".cache").write_text("a file where a folder should be")
    with pytest.raises(StudyError, match="dataset.residency: the images take 0.000.* GB and are to be mapped"):
        mapped()


def test_a_part_of_a_users_own_file_is_mapped_where_it_is(tmp_path: Path):
    pixels = np.arange(24, dtype=np.uint8).reshape(8, 1, 3, 1)
    np.save(tmp_path / "own.npy", pixels)
    own = np.load(tmp_path / "own.npy", mmap_mode="r")
    place = Mapped.of(np.asarray(own)[2:5])
    assert place is not None
    assert place.file == str(tmp_path / "own.npy")
    np.testing.assert_array_equal(place.open(), pixels[2:5])
    assert Mapped.of(own[::2]) is None
    assert Mapped.of(pixels) is None


def test_a_study_settles_its_data(home: Path, monkeypatch: pytest.MonkeyPatch):
    study = tiny_study(dataset=SPEC.model_dump(mode="json"))
    (held,) = datasets.load_all(study).values()
    monkeypatch.setattr(residency, "machine_memory", lambda: 4 * held.nbytes)
    (found,) = datasets.load_all(study).values()
    assert (held.mapped, found.mapped) == (False, True)
    assert datasets.identities(study, {datasets.source(SPEC): found}) == datasets.identities(
        study, {datasets.source(SPEC): held}
    )


def test_size_decides_where_images_lie(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "machine_memory", lambda: 1000)
    assert residency.on_machine("auto", 200) == "device"
    assert residency.on_machine("auto", 201) == "host"
    assert residency.on_machine("device", 2000) == "device"
    assert residency.on_machine("host", 1) == "host"
    assert residency.on_device("auto", 500, free=1000) == "device"
    assert residency.on_device("auto", 501, free=1000) == "host"
    monkeypatch.setattr(residency, "machine_memory", lambda: 10**10)
    words = residency.in_words("auto", 3 * 10**9, gpus=False)
    assert words.startswith("3 GB of images, mapped from a file that the workers of a node share (up to 20% of")
    assert residency.in_words("auto", 10**6, gpus=True).endswith(
        "on GPUs with 2 MB free, else copied a mini-batch ahead"
    )
    assert residency.in_words("device", 10**6, gpus=True) == "1 MB of images, held in memory; on the GPU"


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that refuses to map what might not find room")
def test_more_is_mapped_than_the_machine_has_memory(tmp_path: Path):
    size = 4 * machine_memory()
    with (tmp_path / "large.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
        out.truncate(out.tell() + size)  # takes no room on the disk
    images = open_mapped(tmp_path / "large.npy")
    assert images.shape == (size,)
    assert images[-1] == 0
    place = Mapped.of(images[5:])
    assert place is not None
    assert place.open().shape == (size - 5,)
