"""Arrays that lie in files and are mapped from there, as many processes as like it; the system reads what is looked at,
and keeps it in memory while there is room, once for all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Mapped(NamedTuple):
    """Where an array of bytes lies."""

    file: str
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: NDArray[np.uint8]) -> Mapped | None:
        """Where an array lies; None where it lies in no file, or not in one piece."""
        root: Any = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not isinstance(root, np.memmap) or root.filename is None or not array.flags.c_contiguous:
            return None
        return cls(str(root.filename), root.offset + array.ctypes.data - root.ctypes.data, array.shape)

    def open(self) -> NDArray[np.uint8]:
        """The array.

        Raises:
            OSError: the file is not here.
            ValueError: it is shorter than that.
        """
        return np.asarray(np.memmap(self.file, np.uint8, "r", self.offset, self.shape))


def open_mapped(file: Path) -> NDArray[Any]:
    """The array of an `.npy` file, mapped and read-only: Linux maps nothing that could be written to, and so might come
    to lie in memory, of more than the machine has.

    Raises:
        OSError: the file is not here.
        ValueError: it is damaged.
    """
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))


def write_array(file: Path, shape: tuple[int, ...], pieces: Iterable[NDArray[np.uint8]]) -> None:
    """Write bytes as an `.npy`, piece by piece along the first dimension; whole or not at all.

    Raises:
        OSError: there is no room for it, or no right to write it.
    """
    head = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def fill(out: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(out, head)
        for piece in pieces:
            out.write(piece.data)

    write(file, fill)


def write(file: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: there is no room for it, or no right to write it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
        try:
            fill(out)
        except OSError:
            os.unlink(out.name)
            raise
    os.replace(out.name, file)
