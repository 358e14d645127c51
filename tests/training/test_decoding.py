"""Image files decoded into one file: in parallel, interrupted, by two at once, and where there is no room."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lbstudy.study.file import StudyError
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets, decoding
from lbstudy.training.decoding import Shape, TreeError, decode

COUNT = 11


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Photographs of differing sizes."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        size = tuple(draw.integers(12, 40, 2))
        found.append(tmp_path / f"{number:02d}.jpg")
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(found[-1])
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded, as they are; in tasks of two."""
    seen: list[Path] = []
    pixels = decoding._pixels

    def watched(file: Path, *rest: Any) -> np.ndarray:
        seen.append(file)
        return pixels(file, *rest)

    monkeypatch.setattr(decoding, "_pixels", watched)
    monkeypatch.setattr(decoding, "CHUNK", 2)
    return seen


def wanted(files: list[Path], size: int) -> np.ndarray:
    images = [Image.open(file).resize((size, size), Image.Resampling.BILINEAR) for file in files]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


@pytest.mark.parametrize("in_one_process", [0, COUNT])
def test_all_are_brought_to_a_size(
    files: list[Path], tmp_path: Path, in_one_process: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding, "IN_ONE_PROCESS", in_one_process)
    monkeypatch.setattr(decoding, "CHUNK", 4)
    shown: list[int] = []
    assert decode(files, Shape(16), tmp_path / "x.npy", counting(shown)) == {"RGB": COUNT}
    assert len(shown) == COUNT
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), wanted(files, 16))
    assert sorted(f.name for f in tmp_path.glob("x.*")) == ["x.json", "x.npy"]


def counting(shown: list[int], stop: int | None = None, then: Callable[[], object] = lambda: None) -> decoding.Track:
    """Counts what has been shown; at `stop` of them it does something."""

    def track(items: Iterable[Any], count: int, doing: str) -> Iterator[Any]:
        assert count == COUNT
        for item in items:
            shown.append(1)
            if len(shown) == stop:
                then()
            yield item

    return track


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("by", [interrupt, lambda: (_ for _ in ()).throw(MemoryError)], ids=["key", "error"])
def test_interrupted_it_goes_on_where_it_was(files: list[Path], tmp_path: Path, decoded: list[Path], by: Any):
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        decode(files, Shape(16), tmp_path / "x.npy", counting([], stop=6, then=by))
    assert not (tmp_path / "x.npy").exists()
    before = list(decoded)
    assert 4 <= len(before) < COUNT
    decoded.clear()
    shown: list[int] = []
    decode(files, Shape(16), tmp_path / "x.npy", counting(shown))
    assert decoded == files[len(before) :]
    assert len(shown) == COUNT
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), wanted(files, 16))


def test_what_was_begun_for_other_files_is_begun_again(files: list[Path], tmp_path: Path, decoded: list[Path]):
    np.save(tmp_path / "x.part.npy", np.zeros((3, 3, 16, 16), np.uint8))
    (tmp_path / "x.part.npy").rename(tmp_path / "x.part")
    (tmp_path / "x.done").write_bytes(b"\1" * 3)
    decode(files, Shape(16), tmp_path / "x.npy", None)
    assert decoded == files


def test_two_may_decode_at_the_same_time(files: list[Path], tmp_path: Path, decoded: list[Path]):
    target = tmp_path / "x.npy"
    faster = counting([], stop=3, then=lambda: decode(files, Shape(16), target, None))
    assert decode(files, Shape(16), target, faster) == {"RGB": COUNT}
    np.testing.assert_array_equal(np.load(target), wanted(files, 16))


def test_a_damaged_file_is_named_and_the_rest_is_kept(files: list[Path], tmp_path: Path, decoded: list[Path]):
    whole = files[7].read_bytes()
    files[7].write_bytes(whole[:-100])  # its head can be read
    with pytest.raises(TreeError, match=r"07\.jpg is no readable image: .*truncated"):
        decode(files, Shape(16), tmp_path / "x.npy", None)
    files[7].write_bytes(whole)
    decoded.clear()
    decode(files, Shape(16), tmp_path / "x.npy", None)
    assert decoded == files[6:]


def test_without_room_images_are_decoded_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    for part in ("train", "test"):
        for label in range(2):
            (tmp_path / part / str(label)).mkdir(parents=True)
            Image.new("RGB", (8, 8), (label, 2, 3)).save(tmp_path / part / str(label) / "0.png")
    found = datasets.load(DatasetSpec(name="image_folder", root=str(tmp_path)))
    assert found.train_images[:, :, 0, 0].tolist() == [[0, 2, 3], [1, 2, 3]]
    kept = list((tmp_path / "home/.cache/lbstudy/decoded").iterdir())
    assert [file.suffix for file in kept] == [".json"]

    def out_of_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", out_of_memory)
    sentence = (
        r"\.npy cannot be written: No space left on device, and neither does this machine's memory hold its 4 images"
    )
    with pytest.raises(StudyError, match=sentence):
        datasets.load(DatasetSpec(name="image_folder", root=str(tmp_path)))


def test_crop_takes_the_middle_of_the_short_side(tmp_path: Path):
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8) * 10, (8, 20))
    Image.fromarray(np.ascontiguousarray(columns)).save(tmp_path / "wide.png")
    Image.fromarray(np.ascontiguousarray(columns.T)).save(tmp_path / "tall.png")
    images, _ = decoding.in_memory([tmp_path / "wide.png", tmp_path / "tall.png"], Shape(8, crop=True), None)
    np.testing.assert_array_equal(images[0, 0], columns[:, 6:14])
    np.testing.assert_array_equal(images[1, 0], columns[:, 6:14].T)
    smaller, _ = decoding.in_memory([tmp_path / "wide.png"], Shape(4, crop=True), None)
    np.testing.assert_allclose(smaller[0, 0, :, 1:3], [[85, 105]] * 4, atol=1)  # between columns 8 and 9, 10 and 11


def test_fit_is_a_part_of_what_is_read():
    spec = DatasetSpec(name="image_folder", root="/here", image_size=8)
    assert "image_fit" not in datasets.source(spec)  # as in records from before there was a choice
    assert datasets.source(spec) != datasets.source(spec.model_copy(update={"image_fit": "crop"}))
