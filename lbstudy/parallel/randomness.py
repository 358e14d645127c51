"""Random streams as functions of their coordinates.

Nothing in a run draws from a shared, stateful generator. Every draw belongs to a named purpose and to
coordinates such as (seed, epoch) or (seed, step); whoever knows these can repeat it. That is why no draw depends
on the number of workers, and why a checkpoint needs no generator state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np


def stream(seed: int, purpose: str, *coordinates: int | str) -> np.random.Generator:
    """The NumPy generator of one purpose at the given coordinates."""
    import numpy as np  # a fifth of the time of `lbstudy --help`, which draws nothing

    return np.random.default_rng(_entropy(seed, purpose, coordinates))


def derive_seed(seed: int, purpose: str, *coordinates: int | str) -> int:
    """A 32-bit seed for generators that take an integer (torch's, Optuna's, a trial's)."""
    import numpy as np

    return int(np.random.SeedSequence(_entropy(seed, purpose, coordinates)).generate_state(1)[0])


def _entropy(seed: int, purpose: str, coordinates: tuple[int | str, ...]) -> list[int]:
    words = (purpose, *coordinates)
    return [seed, *(crc32(word.encode()) if isinstance(word, str) else word for word in words)]
