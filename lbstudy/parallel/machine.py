"""What of this machine a process may use: less than there is, in a container, a job of SLURM or under `taskset`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use, by version of its control groups."""


def usable_cpus() -> int:
    """The CPUs that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def machine_memory() -> int:
    """Bytes of memory that there are for this machine's processes, or for those of this container."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in LIMITS:
        with suppress(OSError, ValueError):  # elsewhere than on Linux; "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)
