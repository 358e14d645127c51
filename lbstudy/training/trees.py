"""Image trees, `train/<class>/**` and `test/<class>/**`, as uint8 arrays; `decoding` makes these of the files, once.

Every file below the two folders is used or named: `Origin.left_out` says how many of which kind were not, and the first
of each. All images are brought to 8 bits a channel, and to one mode: grey if all are grey, else RGB. EXIF orientation
is not applied and alpha is dropped, as torchvision's `ImageFolder` does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np

from lbstudy.training.decoding import Shape, Track, TreeError, decode, in_memory
from lbstudy.training.mapped import open_mapped

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}

DECODER = 2
"""Counts the rules by which files become pixels; a cache made by other rules is not read."""

SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "lost+found"}
"""Names that operating systems and file servers leave behind, in lower case."""

PARTS = ("train", "test")


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
    kinds = {kind: LeftOut(len(places), places[0]) for kind, places in sorted(left_out.items())}
    tree = Tree(root, tuple(classes), used["train"], used["test"], kinds)
    check_classes(tree, str(root))
    return tree


def check_classes(tree: Tree, where: str) -> None:
    """Make sure that there are two classes or more, and that each has images in both parts.

    Raises:
        TreeError: otherwise; it says where.
    """
    for part, images in zip(PARTS, (tree.train, tree.test), strict=True):
        if empty := sorted(set(range(len(tree.class_names))) - {label for _, label in images}):
            raise TreeError(f"class {tree.class_names[empty[0]]!r} has no {part} images in {where}")
    if len(tree.class_names) < 2:
        raise TreeError(f"two classes or more are needed; got {', '.join(tree.class_names) or 'none'} in {where}")


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


def read(tree: Tree, shape: Shape, cache_folder: Path, track: Track | None = None) -> tuple[Any, ...]:
    """Decode an image tree, or take what was decoded before.

    Args:
        tree: the files.
        shape: what to bring every image to.
        cache_folder: where decoded trees lie. A tree's name there follows from its files' paths, sizes and times of
            modification and of change; the last is set by the operating system alone, so that an image which was
            rewritten is decoded again.
        track: shows progress.

    Returns:
        Training images (uint8, N x C x H x W) and labels (int64, N), test images and labels, and the `Origin`. The
        images are mapped from the file that they were decoded into, unless none could be written.

    Raises:
        TreeError: an image cannot be read, or not all have one size.
        OSError: a file cannot be read.
    """
    listed = tree.train + tree.test
    files, split = [file for file, _ in listed], len(tree.train)
    target = cache_folder / f"{_key(tree, shape)}.npy"
    try:
        modes = decode(files, shape, target, track)
        images = open_mapped(target)
    except OSError as error:  # without room for it, or the right to write it, the next run decodes again
        try:
            images, modes = in_memory(files, shape, track)
        except MemoryError:
            reason = f"{error.strerror or error}, and neither does this machine's memory hold its {len(files):,} images"
            raise TreeError(f"{target} cannot be written: {reason}") from error
    labels = np.array([label for _, label in listed], dtype=np.int64)
    return (
        images[:split],
        labels[:split],
        images[split:],
        labels[split:],
        Origin(tree.class_names, modes, tree.left_out),
    )


def _key(tree: Tree, shape: Shape) -> str:
    size = f"{shape.size} crop" if shape.crop else f"{shape.size}"
    digest = hashlib.sha256(f"{DECODER} {os.fsencode(os.path.realpath(tree.root))!r} {size}".encode())
    for file, label in tree.train + tree.test:
        status = file.stat()
        times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        digest.update(os.fsencode(file.relative_to(tree.root)) + f" {label} {times}\n".encode())
    return digest.hexdigest()[:24]
