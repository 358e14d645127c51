"""Image trees, `train/<class>/**` and `test/<class>/**`, decoded once into uint8 arrays.

Every file below the two folders is used or named: `Origin.left_out` says how many of which kind were not, and the first
of each. All images are brought to 8 bits a channel, and to one mode: grey if all are grey, else RGB. EXIF orientation
is not applied and alpha is dropped, as torchvision's `ImageFolder` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}

DECODER = 2
"""Counts the rules by which files become pixels; a cache made by other rules is not read."""

SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "lost+found"}
"""Names that operating systems and file servers leave behind, in lower case."""

PARTS = ("train", "test")

Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps the decoding to show progress: (files, count) -> files."""


class TreeError(Exception):
    """Why a folder is no image tree that can be trained on; a sentence."""


class LeftOut(NamedTuple):
    """Files of one kind that are not used."""

    files: int
    first: str  # its path below the root


@dataclass(frozen=True)
class Origin:
    """What an image tree holds that its arrays do not show."""

    class_names: tuple[str, ...] = ()
    modes: dict[str, int] = field(default_factory=dict)  # Pillow's, as stored, and how many images have it
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # by kind: an ending, or `hidden`


class Tree(NamedTuple):
    """The files of an image tree: path and label, in the order of their paths below the class folders."""

    root: Path
    class_names: tuple[str, ...]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    left_out: dict[str, LeftOut]


def is_tree(root: Path) -> bool:
    """Whether there is an image tree in a folder."""
    return all((root / part).is_dir() for part in PARTS)


def list_files(root: Path) -> Tree:
    """List an image tree; labels follow the alphabetical order of the class names.

    Raises:
        TreeError: the two parts have other classes, or a class has no images.
        OSError: a folder cannot be read.
    """
    names = {part: sorted(f.name for f in (root / part).iterdir() if f.is_dir() and not is_hidden(f)) for part in PARTS}
    classes = names["train"]
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise TreeError(f"{root / 'train'} needs a folder for each of two classes or more; got {found}")
    if names["test"] != classes:
        odd = sorted(set(names["test"]) ^ set(classes))
        raise TreeError(f"{root}/train and {root}/test have different classes: {', '.join(odd[:5])}")
    used: dict[str, list[tuple[Path, int]]] = {}
    left_out: dict[str, list[str]] = {}
    labels = {name: label for label, name in enumerate(classes)}
    for part in PARTS:
        used[part] = []
        for file in _walk(root / part):
            place = file.relative_to(root)
            if kind := _why_not(root, place):
                left_out.setdefault(kind, []).append(str(place))
            else:
                used[part].append((file, labels[place.parts[1]]))
        if not used[part]:
            raise TreeError(f"no images in {root / part}; looked for {', '.join(sorted(SUFFIXES))}")
        if empty := sorted(set(range(len(classes))) - {label for _, label in used[part]}):
            raise TreeError(f"class {classes[empty[0]]} has no images in {root / part}")
    kinds = {kind: LeftOut(len(places), places[0]) for kind, places in sorted(left_out.items())}
    return Tree(root, tuple(classes), used["train"], used["test"], kinds)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, or an operating system's own."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def _walk(folder: Path) -> Iterable[Path]:
    """All files below a folder by class and path; links are followed, but not into a folder that they lie in."""
    above: dict[str, set[Path]] = {}
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = Path(os.path.realpath(where))
        around = above.get(os.path.dirname(where), set())
        if real in around:
            folders.clear()
            continue
        above[where] = around | {real}
        folders.sort()
        yield from (Path(where, name) for name in sorted(files))


def _raise(error: OSError) -> None:
    raise error


def _why_not(root: Path, place: Path) -> str:
    """Why a file, by its path below the root, is not used; empty where it is."""
    inside = [Path(part) for part in place.parts[1:]]
    if any(map(is_hidden, inside)):
        return "hidden"
    if len(inside) < 2:
        return "in no class"
    suffix = place.suffix.lower()
    if suffix not in SUFFIXES:
        return suffix or "without an ending"
    return "" if S_ISREG((root / place).stat().st_mode) else "that are pipes, sockets or devices"


def read(root: Path, size: int | None, cache_folder: Path, track: Track | None = None) -> tuple[Any, ...]:
    """Decode an image tree, or take what was decoded before.

    Args:
        root: of the tree.
        size: resize every image to so many pixels square.
        cache_folder: where decoded trees lie. A tree's name there follows from its files' paths, sizes and times of
            modification and of change; the last is set by the operating system alone, so that an image which was
            rewritten is decoded again.
        track: shows progress.

    Returns:
        Training images (uint8, N x C x H x W) and labels (int64, N), test images and labels, and the `Origin`.

    Raises:
        TreeError: it is no tree, an image cannot be read, or not all have one size.
        OSError: a folder cannot be read.
    """
    tree = list_files(root)
    cache = cache_folder / f"{_key(tree, size)}.npz"
    listed = tree.train + tree.test
    if (stored := _read_cache(cache)) is None:
        images, modes = _decode([file for file, _ in listed], size, track)
        with suppress(OSError):  # without room for it, or the right to write it, the next run decodes again
            _write_cache(cache, images, modes)
    else:
        images, modes = stored
    labels = np.array([label for _, label in listed], dtype=np.int64)
    split = len(tree.train)
    origin = Origin(tree.class_names, modes, tree.left_out)
    return images[:split], labels[:split], images[split:], labels[split:], origin


def _key(tree: Tree, size: int | None) -> str:
    digest = hashlib.sha256(f"{DECODER} {os.fsencode(os.path.realpath(tree.root))!r} {size}".encode())
    for file, label in tree.train + tree.test:
        status = file.stat()
        times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        digest.update(os.fsencode(file.relative_to(tree.root)) + f" {label} {times}\n".encode())
    return digest.hexdigest()[:24]


def _read_cache(cache: Path) -> tuple[NDArray[np.uint8], dict[str, int]] | None:
    if cache.is_file():
        with suppress(Exception), np.load(cache, allow_pickle=False) as stored:  # a damaged cache is made again
            return stored["images"], json.loads(str(stored["modes"]))
    return None


def _write_cache(cache: Path, images: NDArray[np.uint8], modes: dict[str, int]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".npz", delete=False) as out:
        try:
            np.savez(out, images=images, modes=np.array(json.dumps(modes)))
        except OSError:
            os.unlink(out.name)
            raise
    os.replace(out.name, cache)


def _decode(files: list[Path], size: int | None, track: Track | None) -> tuple[NDArray[np.uint8], dict[str, int]]:
    from PIL import Image

    tracked: Iterable[Path] = track(files, len(files)) if track else files
    images: list[NDArray[np.uint8]] = []
    modes: Counter[str] = Counter()
    try:
        for file in tracked:
            try:
                with Image.open(file) as stored:
                    modes[stored.mode] += 1
                    image = eight_bits(stored)
                pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR) if size else image)
            except TreeError as error:
                raise TreeError(f"{file} {error}") from None
            except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError and more on a damaged file
                reason = " ".join(str(error).split()) or type(error).__name__
                raise TreeError(f"{file} is no readable image: {reason}") from error
            if images and pixels.shape[:2] != images[0].shape[:2]:
                raise TreeError(
                    f"{file} is {_in_words(pixels)}, the images before it are {_in_words(images[0])}; "
                    "set dataset.image_size to resize them all"
                )
            images.append(pixels)
    finally:
        if isinstance(tracked, Generator):
            tracked.close()  # ends the progress bar here, and not in whichever thread collects the garbage
    return _of_one_mode(images), dict(modes)


def eight_bits(image: Image) -> Image:
    """A stored image as `L` if it is grey, else as `RGB`; 16 bits a pixel are scaled to 8.

    Raises:
        TreeError: its pixels have no known range (32-bit integers, floating point).
    """
    from PIL import Image as images

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):  # 0 to 65535
        return images.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise TreeError(f"has pixels of {kind}, whose range is not known; store 8 or 16 bits a channel")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _of_one_mode(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Grey (H x W) and colour (H x W x 3) images as N x C x H x W: grey if all are."""
    if all(pixels.ndim == 2 for pixels in images):
        return np.stack(images)[:, None]
    height, width = images[0].shape[:2]
    together = np.empty((len(images), 3, height, width), np.uint8)
    for place, pixels in enumerate(images):
        together[place] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return together


def _in_words(pixels: NDArray[np.uint8]) -> str:
    """Height x width."""
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
