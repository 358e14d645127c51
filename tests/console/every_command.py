"""Every command of the command line, one after the other in one process, on a study's folder; Ray is not to be had.

`python -m tests.console.every_command STUDY` prints a line for each: its exit code and its name.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace

from lbstudy.console import cli, watch

COMMANDS = [
    ["best", "STUDY"], ["status", "STUDY"], ["watch", "STUDY"], ["figures", "STUDY"], ["report", "STUDY"],
    ["table", "STUDY", "gap"], ["table", "STUDY", "split"], ["table", "STUDY", "targets"],
    ["table", "STUDY", "critical"], ["table", "STUDY", "health"], ["table", "STUDY", "sharpness"],
    ["table", "STUDY", "correlations"], ["table", "STUDY", "noise"], ["compare", "STUDY", "STUDY"],
    ["unlock", "STUDY"], ["track", "STUDY"], ["landscape", "STUDY"], ["sharpness", "STUDY"], ["noise", "STUDY"], ["confirm", "STUDY"],
    ["run", "STUDY"], ["all", "STUDY"], ["run", "digits.yaml", "--storage", "STUDY"], ["plan", "STUDY"], ["doctor", "STUDY"],
    ["doctor", "--storage", "STUDY"], ["demo", "--storage", "STUDY"], ["schema"],
]  # fmt: skip
"""Each command, with STUDY for a folder."""


def without_ray(*arguments: object, **options: object) -> None:
    """What stands in for the start of Ray."""
    raise OSError(5, "no Ray in this test", "/dev/ray")


def interrupted(seconds: float) -> None:
    """What stands in for the time between two pages: somebody ends it."""
    raise KeyboardInterrupt


SHORT_WATCH = SimpleNamespace(monotonic=time.monotonic, sleep=interrupted)


def lbstudy(arguments: Sequence[str]) -> int:
    """Run a command here; returns its exit code."""
    sys.argv = ["lbstudy", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def main(study: str) -> None:
    """Run all of them."""
    from lbstudy.tuning import tuner

    tuner.connect, watch.time = without_ray, SHORT_WATCH  # type: ignore[assignment]
    for command in COMMANDS:
        code = lbstudy([study if part == "STUDY" else part for part in command])
        with suppress(OSError):
            print(f"exit code {code}: {' '.join(command)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
