"""Image files decoded once, by several processes, into one mapped file that all who train on them share.

A file that is being filled (`NAME.part`) has a list of the images that are in it (`NAME.done`), so that decoding which
was interrupted goes on where it was. Whoever decodes the same files at the same time writes the same bytes.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbstudy.parallel.machine import usable_cpus
from lbstudy.training.mapped import write

if TYPE_CHECKING:
    from PIL.Image import Image

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps a pass over images to show progress: (what is iterated over once an image, count, what is done) -> the same."""

DECODING = "decoding the images, once"

CHUNK = 64
"""Images of a task of a process."""

IN_ONE_PROCESS = 2048
"""Images at most for which no other processes are started, which takes a second."""

SAFE_SECONDS = 10.0
"""Of work, at most, that are lost when the machine stops."""


class TreeError(Exception):
    """Why files are no images that can be trained on; a sentence."""


class Shape(NamedTuple):
    """What all images are brought to."""

    size: int | None = None  # pixels square; None: as they are
    crop: bool = False  # the short side is brought to that size and the middle taken; else the image is stretched


class Found(NamedTuple):
    """What an image is, as its head says."""

    mode: str  # Pillow's
    grey: bool
    height: int
    width: int

    def in_words(self) -> str:
        """Height x width."""
        return f"{self.height}x{self.width}"


def decode(files: Sequence[Path], shape: Shape, target: Path, track: Track | None) -> dict[str, int]:
    """Decode images into a file, unless they are in it already.

    Args:
        files: the images.
        shape: what to bring them to.
        target: an `.npy` of uint8, N x C x H x W, which then holds all of them.
        track: shows progress.

    Returns:
        How many images have which of Pillow's modes.

    Raises:
        TreeError: a file is no image, or has another size than those before it.
        OSError: there is no room for the file, or no right to write it.
    """
    facts = target.with_suffix(".json")
    with suppress(OSError, ValueError):  # not there, or damaged
        if target.is_file():
            np.load(target, mmap_mode="r", allow_pickle=False)  # cut short it raises ValueError
            return dict(json.loads(facts.read_text()))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _workers(len(files)) as spread:
        heads = [head for chunk in spread(_heads, [(part,) for _, part in _chunks(files)]) for head in chunk]
        channels, height, width = _common(files, heads, shape)
        modes = dict(Counter(head.mode for head in heads))
        write(facts, lambda out: out.write(json.dumps(modes).encode()))
        part = target.with_suffix(".part")
        try:
            done = _begin(part, (len(files), channels, height, width))
            tasks = [(start, chunk) for start, chunk in _chunks(files) if not done[start : start + len(chunk)].all()]
            results = spread(_fill, [(part, start, chunk, shape) for start, chunk in tasks])
            exhaust(_marked(part, done, zip(tasks, results, strict=True)), len(files), track, DECODING)
            os.replace(part, target)
            part.with_suffix(".done").unlink(missing_ok=True)
        except FileNotFoundError:
            if not target.is_file():  # else another process has filled it
                raise
    return modes


def exhaust(finished: Iterable[object], count: int, track: Track | None, doing: str) -> None:
    """Wait until all is finished, and show progress."""
    finished = track(finished, count, doing) if track else finished
    try:
        for _ in finished:
            pass
    finally:
        if isinstance(finished, Generator):
            finished.close()  # ends the progress bar here, and not in whichever thread collects the garbage


def in_memory(
    files: Sequence[Path], shape: Shape, track: Track | None
) -> tuple[NDArray[np.uint8], dict[str, int]]:  # fmt: skip
    """Decode images where no file can be written; see `decode`."""
    heads = _heads(files)
    images = np.empty((len(files), *_common(files, heads, shape)), np.uint8)

    def fill() -> Iterator[int]:
        for place, file in enumerate(files):
            images[place] = _pixels(file, shape, images.shape[1:])
            yield place

    exhaust(fill(), len(files), track, DECODING)
    return images, dict(Counter(head.mode for head in heads))


def _chunks(files: Sequence[Path]) -> Iterator[tuple[int, Sequence[Path]]]:
    for start in range(0, len(files), CHUNK):
        yield start, files[start : start + CHUNK]


@contextmanager
def _workers(images: int) -> Iterator[Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterator[Any]]]:
    """A way to call a function with many arguments, in processes where there are many images; results in order."""
    cpus = usable_cpus()
    if images <= IN_ONE_PROCESS or cpus == 1:
        yield lambda function, arguments: (function(*given) for given in arguments)
        return
    # spawned: a forked process would share locks with threads that it does not have
    with ProcessPoolExecutor(cpus, get_context("spawn"), _leave_interrupts_to_the_parent) as pool:
        try:
            yield (
                lambda function, arguments: pool.map(function, *zip(*arguments, strict=True)) if arguments else iter(())
            )
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _heads(files: Sequence[Path]) -> list[Found]:
    """What the images are."""
    from PIL import Image

    found = []
    for file in files:
        with _blamed(file), Image.open(file) as image:
            found.append(Found(image.mode, _is_grey(image), image.height, image.width))
    return found


def _common(files: Sequence[Path], heads: Sequence[Found], shape: Shape) -> tuple[int, int, int]:
    """Channels, height and width that all images are brought to: grey if all are, else RGB."""
    first = heads[0]
    for file, head in zip(files, heads, strict=True):
        if shape.size is None and (head.height, head.width) != (first.height, first.width):
            raise TreeError(
                f"{file} is {head.in_words()}, the images before it are {first.in_words()}; "
                "set dataset.image_size to resize them all"
            )
    height, width = (shape.size, shape.size) if shape.size else (first.height, first.width)
    return 1 if all(head.grey for head in heads) else 3, height, width


def _begin(part: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The list of what is in a file that is being filled, which is begun if it is not there.

    Raises:
        OSError: there is no room for it.
    """
    listed = part.with_suffix(".done")
    with suppress(OSError, ValueError):
        if np.load(part, mmap_mode="r").shape == shape and listed.stat().st_size == shape[0]:
            return np.memmap(listed, np.uint8, "r+")
    with tempfile.NamedTemporaryFile(dir=part.parent, delete=False) as out:
        try:
            images = np.lib.format.open_memmap(out.name, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # else a full disk ends the process that writes there
                os.posix_fallocate(out.fileno(), 0, images.offset + images.nbytes)
        except OSError:
            os.unlink(out.name)
            raise
    write(listed, lambda out: out.write(bytes(shape[0])))
    os.replace(out.name, part)
    return np.memmap(listed, np.uint8, "r+")


def _marked(
    part: Path, done: NDArray[np.uint8], results: Iterable[tuple[tuple[int, Sequence[Path]], Any]]
) -> Iterator[int]:
    """Takes note of the images that are in the file for certain; yields once for each."""
    yield from np.flatnonzero(done).tolist()
    waiting: list[int] = []
    safe = time.monotonic()

    def mark() -> None:
        with part.open("rb+") as filled:
            os.fsync(filled.fileno())
        done[waiting] = 1
        waiting.clear()

    try:
        for (start, chunk), _ in results:
            fresh = [place for place in range(start, start + len(chunk)) if not done[place]]
            waiting += fresh
            if time.monotonic() - safe > SAFE_SECONDS:
                mark()
                safe = time.monotonic()
            yield from fresh
    finally:
        if waiting:
            mark()


def _fill(part: Path, start: int, files: Sequence[Path], shape: Shape) -> None:
    images = np.load(part, mmap_mode="r+")
    for place, file in enumerate(files, start):
        images[place] = _pixels(file, shape, images.shape[1:])


def _pixels(file: Path, shape: Shape, wanted: tuple[int, ...]) -> NDArray[np.uint8]:
    """An image as it is wanted: C x H x W."""
    from PIL import Image, ImageOps

    with _blamed(file), Image.open(file) as stored:
        image = eight_bits(stored)
        if shape.size and shape.crop:
            image = ImageOps.fit(image, (shape.size, shape.size), Image.Resampling.BILINEAR)
        elif shape.size:
            image = image.resize((shape.size, shape.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.broadcast_to(planes, wanted)


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    """Errors within it are about this file."""
    try:
        yield
    except TreeError as error:
        raise TreeError(f"{file} {error}") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError and more on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TreeError(f"{file} is no readable image: {reason}") from error


def _is_wide(image: Image) -> bool:
    """Whether its pixels are of 16 bits, 0 to 65535."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def _is_grey(image: Image) -> bool:
    """Whether a stored image has no colour.

    Raises:
        TreeError: its pixels have no known range (32-bit integers, floating point).
    """
    if image.mode in ("I", "F") and not _is_wide(image):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise TreeError(f"has pixels of {kind}, whose range is not known; store 8 or 16 bits a channel")
    return _is_wide(image) or image.mode in ("1", "L", "LA", "La")


def eight_bits(image: Image) -> Image:
    """A stored image as `L` if it is grey, else as `RGB`; 16 bits a pixel are scaled to 8.

    Raises:
        TreeError: its pixels have no known range (32-bit integers, floating point).
    """
    from PIL import Image as images

    grey = _is_grey(image)
    if _is_wide(image):
        return images.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("L" if grey else "RGB")
