"""Image trees as people have them: depths, modes, hidden files, folders within classes, images that are rewritten."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbstudy.training import decoding, trees
from lbstudy.training.decoding import Shape

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of one grey image each, in both parts."""
    for part in trees.PARTS:
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            Image.fromarray(GREY + np.uint8(number)).save(tmp_path / "tree" / part / name / "0.png")
    return tmp_path / "tree"


def read(tree: Path, size: int | None = None) -> tuple[np.ndarray, trees.Origin]:
    """The training images, and what else there is to know."""
    images, _, _, _, origin = trees.read(trees.list_files(tree), Shape(size), tree.parent / "cache")
    return images, origin


def sixteen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint16) * 257


@pytest.mark.parametrize("name", ["0.png", "0.tif"])
def test_16_bits_are_scaled_to_8(tree: Path, name: str):
    (tree / "train" / "cat" / "0.png").unlink()
    Image.fromarray(sixteen(GREY)).save(tree / "train" / "cat" / name)
    images, origin = read(tree)
    np.testing.assert_array_equal(images[0, 0], GREY)
    assert origin.modes == {"I;16": 1, "L": 3}


def test_16_bits_of_a_portable_graymap_are_scaled_to_8(tree: Path):
    (tree / "train" / "cat" / "0.png").unlink()
    header = b"P5\n8 6\n65535\n"
    (tree / "train" / "cat" / "0.pgm").write_bytes(header + sixteen(GREY).astype(">u2").tobytes())
    np.testing.assert_array_equal(read(tree)[0][0, 0], GREY)


def test_rounding_of_16_bits_is_to_the_nearest():
    values = np.array([[0, 128, 129, 256, 257, 65407, 65535]], np.uint16)
    found = np.asarray(decoding.eight_bits(Image.fromarray(values)))
    np.testing.assert_array_equal(found[0], np.round(values[0] / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(tree: Path, dtype: type):
    Image.fromarray(GREY.astype(dtype)).save(tree / "test" / "dog" / "1.tif")
    with pytest.raises(decoding.TreeError, match=r"1\.tif has pixels of .*, whose range is not known"):
        read(tree)


def test_one_colour_image_makes_all_rgb(tree: Path):
    """As torchvision does; a grey image has three equal channels then."""
    colour = np.stack([GREY, GREY // 2, 255 - GREY], axis=2)
    Image.fromarray(colour).save(tree / "test" / "dog" / "1.png")
    images, origin = read(tree)
    assert images.shape == (2, 3, 6, 8)
    np.testing.assert_array_equal(images[0], np.stack([GREY] * 3))
    assert origin.modes == {"L": 4, "RGB": 1}


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_grey_of_other_modes_is_grey(tree: Path, mode: str):
    Image.fromarray(GREY).convert(mode).save(tree / "train" / "cat" / "0.png")
    assert read(tree)[0].shape == (2, 1, 6, 8)


def test_orientation_is_not_applied_as_in_torchvision(tree: Path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(GREY).save(tree / "train" / "cat" / "0.png", exif=turned)
    np.testing.assert_array_equal(read(tree)[0][0, 0], GREY)


def test_every_file_is_used_or_named(tree: Path):
    picture = (tree / "train" / "cat" / "0.png").read_bytes()
    for name in ("deep/er/1.png", "2.TIF", "3.gif", "4.gif", "notes.txt", "README", "._0.png", "Thumbs.db", ".x/5.png"):
        file = tree / "train" / "cat" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    (tree / "train" / "loose.png").write_bytes(picture)
    images, origin = read(tree)
    assert len(images) == 4  # 0.png, deep/er/1.png and 2.TIF of the cat, 0.png of the dog
    assert origin.left_out == {
        ".gif": (2, "train/cat/3.gif"),
        ".txt": (1, "train/cat/notes.txt"),
        "hidden": (3, "train/cat/._0.png"),
        "in no class": (1, "train/loose.png"),
        "without an ending": (1, "train/cat/README"),
    }


def test_a_pipe_with_the_name_of_an_image_is_not_waited_for(tree: Path):
    os.mkfifo(tree / "train" / "cat" / "1.png")
    images, origin = read(tree)
    assert len(images) == 2
    assert origin.left_out == {"that are pipes, sockets or devices": (1, "train/cat/1.png")}


@pytest.mark.parametrize("parts", [["train"], ["test"], ["train", "test"]])
@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_no_classes_in_either_part(tree: Path, parts: list[str], name: str):
    for part in parts:
        (tree / part / name).mkdir()
        (tree / part / name / "0.png").write_bytes((tree / part / "cat" / "0.png").read_bytes())
    _, origin = read(tree)
    assert origin.class_names == ("cat", "dog")
    assert origin.left_out["hidden"].files == len(parts)


def brighter(file: Path) -> None:
    """Rewrite an uncompressed image in place: as many bytes, and the times of before."""
    before = file.stat()
    Image.fromarray(GREY + np.uint8(100)).save(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_image_that_was_rewritten_is_decoded_again(tree: Path):
    file = tree / "train" / "cat" / "0.bmp"
    (tree / "train" / "cat" / "0.png").unlink()
    Image.fromarray(GREY).save(file)
    np.testing.assert_array_equal(read(tree)[0][0, 0], GREY)
    brighter(file)
    np.testing.assert_array_equal(read(tree)[0][0, 0], GREY + np.uint8(100))


def test_what_was_decoded_is_not_decoded_again(tree: Path):
    counts: list[int] = []

    def track(files: list[Path], count: int, doing: str) -> list[Path]:
        counts.append(count)
        return files

    first = trees.read(trees.list_files(tree), Shape(), tree.parent / "cache", track)
    second = trees.read(trees.list_files(tree), Shape(), tree.parent / "cache", track)
    assert counts == [4]
    np.testing.assert_array_equal(first[0], second[0])
    assert first[4] == second[4]


def loop(tree: Path) -> None:
    (tree / "train" / "cat" / "again").symlink_to(tree / "train", target_is_directory=True)


def linked(tree: Path) -> None:
    (tree / "elsewhere").mkdir()
    (tree / "train" / "cat" / "0.png").rename(tree / "elsewhere" / "0.png")
    (tree / "train" / "cat" / "more").symlink_to(tree / "elsewhere", target_is_directory=True)


@pytest.mark.parametrize("change", [loop, linked])
def test_links_to_folders_are_followed_and_end(tree: Path, change: Callable[[Path], None]):
    change(tree)
    assert len(read(tree)[0]) == 2
