"""What the benchmarks share: their command line, taking turns, and the lines that they print.

A result is one line, `| NAME | VALUE | UNIT | COMPARED WITH |`, the last empty where it is nothing but itself; what
else a benchmark says begins otherwise. `run.py` gathers the lines of all.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
LINE = re.compile(r"\| [^|]+ \| [^|]+ \| [^|]+ \| [^|]*\|")
"""A result; `| --- | --- | --- | --- |` would be one too, so nothing prints that."""


class Seconds(NamedTuple):
    """How long something took."""

    wall: float
    cpu: float  # of this process, all threads


class Stopwatch:
    """Seconds since it was made, of the clock on the wall and of this process's CPU time."""

    def __init__(self) -> None:
        self._began = Seconds(time.perf_counter(), time.process_time())

    def seconds(self) -> Seconds:
        """So far."""
        return Seconds(time.perf_counter() - self._began.wall, time.process_time() - self._began.cpu)


def parser(doc: str | None, *, threads: int | None = 1) -> argparse.ArgumentParser:
    """A command line with `--smoke` and, unless None, `--threads`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="see that it works: tiny, in seconds, numbers of no use")
    if threads is not None:
        made.add_argument("--threads", type=int, default=threads, help="of torch; 1 as in a Ray worker with one CPU")
    return made


def machine(device: str = "cpu") -> str:
    """What the numbers were measured on."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return f"{os.cpu_count()} x {', '.join(names) or platform.processor() or platform.machine()}"


def begin(options: argparse.Namespace, what: str = "") -> None:
    """Set torch's threads and say what is measured where and when."""
    threads = getattr(options, "threads", None)
    if threads is not None:
        torch.set_num_threads(threads)
    parts = [
        f"{machine(getattr(options, 'device', 'cpu'))}, torch {torch.__version__}",
        *([f"{threads} threads"] if threads is not None else []),
        *([what] if what else []),
        str(date.today()),
    ]
    print(", ".join(parts), flush=True)


def show(name: str, value: float | str, unit: str, against: str = "") -> None:
    """Print a result."""
    shown = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    print(f"| {name} | {shown} | {unit} | {against}{' ' if against else ''}|", flush=True)


def take_turns(ways: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 1) -> dict[str, list[T]]:
    """What each way gave in each round. They take turns within a round, for a machine's load changes, and every second
    round goes backwards; those that warm up do not count."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(warmup + rounds):
        for name in list(ways) if number % 2 else list(reversed(ways)):
            value = ways[name]()
            if number >= warmup:
                found[name].append(value)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios within each round."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))
